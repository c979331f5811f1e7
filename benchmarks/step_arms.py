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

from benchmarks.official_style import OfficialStyle
from mae_core.images import normalize
from mae_core.model import MaskedAutoencoder
from mae_core.optim import make_optimizer, parameter_groups
from mae_core.randomness import mask_keys
from pipelines.config import Config
from pipelines.data.plan import Cut
from pipelines.training.build import build_model, make_trainer, maybe_compiled
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
        checkpointed: With activation checkpointing.
    """

    code: str
    precision: str = "float32"
    compiled: bool = False
    checkpointed: bool = False


ARMS = {
    "float32": Kind("ours"),
    "float32_compiled": Kind("ours", compiled=True),
    "float32_checkpointed": Kind("ours", checkpointed=True),
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
            "train": {
                "precision": kind.precision,
                "compile": kind.compiled,
                "checkpoint_activations": kind.checkpointed,
            },
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

        return step_of(maybe_compiled(config, ours, device)), step_of(ours)

    # What the run's step does on the way to the device, done once: the others are not timed for it.
    images_BCHW = normalize(torch.from_numpy(batch.images_BHWC).to(device), config.data.mean, config.data.std)
    keys_B = mask_keys(config.run.seed, batch.epoch_B, batch.sample_B, batch.repeat).to(device)
    noise_BN = ours.masking.noise(keys_B)
    if kind.code == "transformers":
        theirs = make_transformers(ours)
        theirs.to(device)
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


def make_transformers(ours: MaskedAutoencoder) -> Any:
    """Transformers' model of the same sizes with the same weights, with scaled-dot-product attention."""
    block: Any = ours.encoder.blocks[0]
    inner: Any = ours.decoder_blocks[0]
    theirs: Any = ViTMAEForPreTraining(
        ViTMAEConfig(
            image_size=ours.image_size[0], patch_size=ours.patch_size, num_channels=ours.channels,
            hidden_size=ours.width, num_hidden_layers=len(ours.encoder.blocks), num_attention_heads=ours.num_heads,
            intermediate_size=block.mlp.fc1.out_features, decoder_hidden_size=ours.decoder_embed.out_features,
            decoder_num_hidden_layers=len(ours.decoder_blocks), decoder_num_attention_heads=ours.decoder_heads,
            decoder_intermediate_size=inner.mlp.fc1.out_features, layer_norm_eps=1e-6,
            mask_ratio=ours.masking.mask_ratio, norm_pix_loss=True,
        )
    )  # fmt: skip
    assert theirs.config._attn_implementation == "sdpa"
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
