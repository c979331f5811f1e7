"""The training steps that ``benchmarks.step`` compares: a run's own, transformers', and a plain loop.

All begin with the same weights, see the same pixels under the same masks, and train by AdamW with the same groups.

Shapes: B batch, C H W image, N patches, K kept, P values a patch, D encoder width, E decoder width.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from mae_core.images import normalize
from mae_core.model import MaskedAutoencoder
from mae_core.optim import make_optimizer, parameter_groups
from mae_core.randomness import mask_keys
from pipelines.config import Config
from pipelines.data.plan import Cut
from pipelines.training.build import build_model, make_trainer
from pipelines.training.dry_run import random_batch
from pipelines.training.step import autocast, train_step

LR = 1e-4
BETAS, DECAY = (0.9, 0.95), 0.05
Step = Callable[[], float]
"""Does one training step; gives the loss that it found."""


@dataclass(frozen=True)
class Kind:
    """What one arm is.

    Attributes:
        code: Whose step.
        precision: As ``train.precision``.
        compiled: By torch.compile.
    """

    code: str
    precision: str = "float32"
    compiled: bool = False


ARMS = {
    "float32": Kind("ours"),
    "float32_compiled": Kind("ours", compiled=True),
    "bfloat16": Kind("ours", "bfloat16"),
    "bfloat16_compiled": Kind("ours", "bfloat16", compiled=True),
    "transformers_float32": Kind("transformers"),
    "transformers_bfloat16": Kind("transformers", "bfloat16"),
    "official_style_float32": Kind("official_style"),
}


def make_config(model: str, image_size: int, batch: int, kind: Kind) -> Config:
    """The configuration of a run of that step; ``model``: a plain ViT of timm."""
    return Config.model_validate(
        {
            "data": {"image_size": (image_size, image_size)},
            "model": {"arch": model, "target": "normalized"},
            "batch": {"global_size": batch, "micro_size": batch},
            "optim": {"weight_decay": DECAY, "betas": BETAS},
            "train": {"precision": kind.precision, "compile": kind.compiled},
        }
    )


def make_step(config: Config, kind: Kind, device: torch.device) -> tuple[Step, Step]:
    """One arm: its step, and the same step without the compiler, for those who count FLOPs.

    Raises:
        UserError: The model's parts do not go together.
    """
    ours = build_model(config).to(device)
    rows = config.batch.global_size
    batch = random_batch(config, rows)
    if kind.code == "ours":
        optimizer = make_optimizer(ours, config.optim.weight_decay, config.optim.betas)
        batches = itertools.repeat(batch)

        def step_of(module: nn.Module) -> Step:
            trainer = make_trainer(config, module, ours.masking, optimizer, Cut(rows, rows, 1), device)
            return lambda: train_step(trainer, batches, LR)[0].item()

        compiled: nn.Module = torch.compile(ours) if kind.compiled else ours  # type: ignore[assignment]
        return step_of(compiled), step_of(ours)

    # What the run's step does on the way to the device, done once: the others are not timed for it.
    images_BCHW = normalize(torch.from_numpy(batch.images_BHWC).to(device), config.data.mean, config.data.std)
    keys_B = mask_keys(config.run.seed, batch.epoch_B, batch.sample_B, batch.repeat).to(device)
    noise_BN = ours.masking.noise(keys_B)
    if kind.code == "transformers":
        theirs: Any = make_transformers(ours).to(device)
        optimizer = torch.optim.AdamW(parameter_groups(theirs, DECAY), lr=LR, betas=BETAS, fused=True)

        def loss() -> torch.Tensor:
            return theirs(images_BCHW, noise=noise_BN).loss

    else:
        plain = OfficialStyle(ours).to(device)
        optimizer = torch.optim.AdamW(parameter_groups(plain, DECAY), lr=LR, betas=BETAS)

        def loss() -> torch.Tensor:
            return plain(images_BCHW, noise_BN)

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        with autocast(kind.precision, device):
            found = loss()
        value = found.item()
        found.backward()
        optimizer.step()
        return value

    return step, step


def make_transformers(ours: MaskedAutoencoder) -> ViTMAEForPreTraining:
    """Transformers' model of the same sizes with the same weights, with scaled-dot-product attention."""
    block: Any = ours.encoder.blocks[0]
    inner: Any = ours.decoder_blocks[0]
    theirs = ViTMAEForPreTraining(
        ViTMAEConfig(
            image_size=ours.image_size[0], patch_size=ours.patch_size, num_channels=ours.channels,
            hidden_size=ours.width, num_hidden_layers=len(ours.encoder.blocks), num_attention_heads=ours.num_heads,
            intermediate_size=block.mlp.fc1.out_features, decoder_hidden_size=ours.decoder_embed.out_features,
            decoder_num_hidden_layers=len(ours.decoder_blocks), decoder_num_attention_heads=ours.decoder_heads,
            decoder_intermediate_size=inner.mlp.fc1.out_features, layer_norm_eps=1e-6,
            mask_ratio=ours.masking.mask_ratio, norm_pix_loss=True, attn_implementation="sdpa",
        )
    )  # fmt: skip
    theirs.load_state_dict(transformers_state(dict(ours.state_dict())), strict=True)
    return theirs.train()


_TRANSFORMERS = {
    "encoder.cls_token": "vit.embeddings.cls_token",
    "encoder.pos_embed": "vit.embeddings.position_embeddings",
    "encoder.patch_embed.proj.": "vit.embeddings.patch_embeddings.projection.",
    "encoder.norm.": "vit.layernorm.",
    "encoder.blocks.": "vit.layers.",
    "decoder_blocks.": "decoder.decoder_layers.",
    "decoder_": "decoder.decoder_",
    "mask_token": "decoder.mask_token",
}
_IN_BLOCKS = {".norm1.": ".layernorm_before.", ".norm2.": ".layernorm_after.", ".attn.proj.": ".attention.o_proj."}


def transformers_state(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our tensors under transformers' names; it splits q, k and v."""
    theirs = {}
    for name, tensor in state.items():
        before, after = next(pair for pair in _TRANSFORMERS.items() if name.startswith(pair[0]))
        renamed = after + name.removeprefix(before)
        for ours, other in _IN_BLOCKS.items():
            renamed = renamed.replace(ours, other)
        if ".attn.qkv." in renamed:
            for part, letter in zip(tensor.chunk(3), "qkv", strict=True):
                theirs[renamed.replace(".attn.qkv.", f".attention.{letter}_proj.")] = part
        else:
            theirs[renamed] = tensor
    return theirs


class _PlainBlock(nn.Module):
    """A pre-norm transformer block whose attention is written out."""

    def __init__(self, width: int, hidden: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, hidden), "fc2": nn.Linear(hidden, width)})

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        B, T, width = tokens.shape
        heads = self.attn["qkv"](self.norm1(tokens)).reshape(B, T, 3, self.num_heads, width // self.num_heads)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        weights = (query @ key.transpose(2, 3) * (width // self.num_heads) ** -0.5).softmax(dim=-1)
        tokens = tokens + self.attn["proj"]((weights @ value).transpose(1, 2).reshape(B, T, width))
        return tokens + self.mlp["fc2"](nn.functional.gelu(self.mlp["fc1"](self.norm2(tokens))))


class OfficialStyle(nn.Module):
    """The method as its authors' code goes about it, written anew from the description in the paper.

    A convolution over all patches, then the kept ones are gathered; mask tokens are appended and everything is put
    back into the image's order; the head and the error are computed for all patches, and the masked ones' errors
    averaged.
    """

    def __init__(self, ours: MaskedAutoencoder) -> None:
        """Takes the sizes and the weights of ours."""
        super().__init__()
        D, E, p = ours.width, ours.decoder_embed.out_features, ours.patch_size
        self.num_keep, self.patch_size = ours.num_keep, p
        block: Any = ours.encoder.blocks[0]
        inner: Any = ours.decoder_blocks[0]
        num_tokens = 1 + ours.num_patches
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(ours.channels, D, p, p)})
        self.cls_token = nn.Parameter(torch.empty(1, 1, D))
        self.pos_embed = nn.Parameter(torch.empty(1, num_tokens, D), requires_grad=False)
        self.blocks = nn.Sequential(
            *(_PlainBlock(D, block.mlp.fc1.out_features, ours.num_heads) for _ in ours.encoder.blocks)
        )
        self.norm = nn.LayerNorm(D, eps=1e-6)
        self.decoder_embed = nn.Linear(D, E)
        self.mask_token = nn.Parameter(torch.empty(1, 1, E))
        self.decoder_pos_embed = nn.Parameter(torch.empty(1, num_tokens, E), requires_grad=False)
        self.decoder_blocks = nn.Sequential(
            *(_PlainBlock(E, inner.mlp.fc1.out_features, ours.decoder_heads) for _ in ours.decoder_blocks)
        )
        self.decoder_norm = nn.LayerNorm(E, eps=1e-6)
        self.decoder_pred = nn.Linear(E, p * p * ours.channels)
        self.load_state_dict({name.removeprefix("encoder."): value for name, value in ours.state_dict().items()})

    def forward(self, images_BCHW: torch.Tensor, noise_BN: torch.Tensor) -> torch.Tensor:
        """The loss."""
        (B, C, H, W), p = images_BCHW.shape, self.patch_size
        tokens_BND = self.patch_embed["proj"](images_BCHW).flatten(2).transpose(1, 2) + self.pos_embed[:, 1:]
        shuffle_BN = noise_BN.argsort(dim=1)
        restore_BN = shuffle_BN.argsort(dim=1)
        keep_BKD = shuffle_BN[:, : self.num_keep, None].repeat(1, 1, tokens_BND.shape[2])
        kept_BKD = tokens_BND.gather(1, keep_BKD)
        cls_B1D = (self.cls_token + self.pos_embed[:, :1]).expand(B, -1, -1)
        latent = self.decoder_embed(self.norm(self.blocks(torch.cat([cls_B1D, kept_BKD], dim=1))))
        masks_BME = self.mask_token.repeat(B, restore_BN.shape[1] - self.num_keep, 1)
        whole_BNE = torch.cat([latent[:, 1:], masks_BME], dim=1)
        whole_BNE = whole_BNE.gather(1, restore_BN[:, :, None].repeat(1, 1, latent.shape[2]))
        tokens = torch.cat([latent[:, :1], whole_BNE], dim=1) + self.decoder_pos_embed
        pred_BNP = self.decoder_pred(self.decoder_norm(self.decoder_blocks(tokens)))[:, 1:]
        cells = images_BCHW.reshape(B, C, H // p, p, W // p, p)
        target_BNP = torch.einsum("bchpwq->bhwpqc", cells).reshape(B, -1, p * p * C)
        mean, variance = target_BNP.mean(dim=-1, keepdim=True), target_BNP.var(dim=-1, keepdim=True)
        error_BN = ((pred_BNP - (target_BNP - mean) / (variance + 1e-6) ** 0.5) ** 2).mean(dim=-1)
        masked_BN = (restore_BN >= self.num_keep).float()
        return (error_BN * masked_BN).sum() / masked_BN.sum()
