"""The masked autoencoder of He et al. (arXiv 2111.06377) around a plain timm Vision Transformer.

Shapes: B batch, C H W image, N patches, K kept, M masked (K + M = N), P values a patch, D encoder width,
E decoder width. A latent has one token more than patches: the class token comes first.
"""

import difflib
from typing import Any, Literal

import timm
import torch
from timm.layers.attention import Attention
from timm.layers.mlp import Mlp
from timm.layers.norm import LayerNorm
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from mae_core.masking import num_kept, random_masking, take
from mae_core.targets import normalize_patches, patchify

_EXAMPLES = ", ".join(f"vit_{size}" for size in ("tiny_patch16_224", "small_patch16_224", "base_patch16_224"))


def sincos_table(grid_size: tuple[int, int], width: int) -> torch.Tensor:
    """Fixed 2-D sine-cosine positions: the first half of the width is the column's, the second the row's.

    Each half is ``width / 4`` sines, then as many cosines, of the coordinate at wavelengths from 2 pi to
    20,000 pi (Vaswani et al., 2017, in two dimensions). The class token, in front, has position 0.

    Args:
        grid_size: Patches down and across.
        width: Width of a token, divisible by 4.

    Returns:
        float32 [1, 1 + N, width], computed in float64.
    """
    frequency = 10_000.0 ** -(torch.arange(width // 4, dtype=torch.float64, device="cpu") / (width // 4))
    row, column = torch.meshgrid(
        *(torch.arange(n, dtype=torch.float64, device="cpu") for n in grid_size), indexing="ij"
    )
    angles = [coordinate.reshape(-1, 1) * frequency for coordinate in (column, row)]
    table = torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=1)
    return nn.functional.pad(table, (0, 0, 1, 0))[None].float()


def _is_plain(vit: nn.Module) -> bool:
    if type(vit) is not VisionTransformer or vit.cls_token is None or vit.num_prefix_tokens != 1:
        return False
    block: Any = vit.blocks[0]
    return (
        vit.pos_embed is not None
        and not vit.no_embed_class
        and isinstance(vit.norm_pre, nn.Identity)
        and isinstance(vit.norm, nn.LayerNorm)
        and vit.norm.eps == 1e-6
        and type(block) is Block
        and isinstance(block.ls1, nn.Identity)
        and type(block.attn) is Attention
        and isinstance(block.attn.q_norm, nn.Identity)
        and block.attn.qkv.bias is not None
        and type(block.mlp) is Mlp
    )


def _plain_vit(arch: str) -> Any:
    """The architecture with timm's own sizes, without memory; refuses what is no plain ViT."""
    names = timm.list_models(module="vision_transformer")
    if arch not in names:
        near = difflib.get_close_matches(arch.split(".")[0], names, n=3)
        hint = f"did you mean {', '.join(near)}?" if near else f"use for example {_EXAMPLES}"
        raise ValueError(f"arch '{arch}' is no Vision Transformer of timm: {hint}")
    with torch.device("meta"):
        vit = timm.create_model(arch, pretrained=False, num_classes=0)
    if not _is_plain(vit):
        raise ValueError(
            f"arch '{arch}' is no plain ViT (class token, no registers, pre-norm, layer scale or average "
            f"pooling): use for example {_EXAMPLES}, and set width, depth and heads"
        )
    return vit


def _check_heads(what: str, width: int, num_heads: int) -> None:
    if width < 4 or width % 4:
        fine = width // 4 * 4 + 4
        raise ValueError(f"{what} width {width} is not divisible by 4 (its position table is): choose {fine}")
    if num_heads < 1 or width % num_heads:
        fine = ", ".join(str(n) for n in range(1, min(width, 32) + 1) if width % n == 0)
        raise ValueError(f"{num_heads} {what} heads do not divide the {what} width {width}: choose one of {fine}")


class MaskedAutoencoder(nn.Module):
    """A ViT that sees a share of an image's patches, and a small decoder that predicts the others.

    ``encoder`` is a plain timm model (its keys in the state dict are timm's, behind ``encoder.``); the
    decoder's keys are those of the official checkpoints. Attributes for callers: ``image_size``,
    ``patch_size``, ``channels``, ``grid_size``, ``num_patches`` (N), ``num_keep`` (K), ``width`` (D),
    ``num_heads``, ``decoder_heads``, ``mask_ratio``, ``normalize_pixels``.
    """

    def __init__(
        self,
        arch: str = "vit_base_patch16_224",
        *,
        image_size: int | tuple[int, int] = 224,
        patch_size: int | None = None,
        channels: int = 3,
        width: int | None = None,
        depth: int | None = None,
        num_heads: int | None = None,
        mlp_ratio: float | None = None,
        decoder_width: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 16,
        mask_ratio: float = 0.75,
        normalize_pixels: bool = False,
        seed: int = 0,
    ) -> None:
        """Builds and initialises the model on the current default device (on ``meta``: shapes alone).

        Args:
            arch: A plain Vision Transformer of timm by name; None in what follows means its own value.
            image_size: Pixels a side, or (H, W).
            patch_size: Pixels a side of a patch; divides the image size.
            channels: Channels of an image.
            width: Encoder width D, divisible by 4 and by the heads.
            depth: Encoder blocks.
            num_heads: Encoder attention heads.
            mlp_ratio: Hidden width of the encoder's MLPs over D.
            decoder_width: Decoder width E, divisible by 4 and by the decoder's heads.
            decoder_depth: Decoder blocks.
            decoder_heads: Decoder attention heads.
            mask_ratio: Share of the patches that the encoder does not see.
            normalize_pixels: Predict each patch normalised by its own mean and variance.
            seed: Of the initial weights.

        Raises:
            ValueError: An unknown or unfit architecture, or sizes that do not go together.
        """
        super().__init__()
        vit = _plain_vit(arch)
        H, W = (image_size, image_size) if isinstance(image_size, int) else image_size
        self.image_size = (H, W)
        self.patch_size: int = vit.patch_embed.patch_size[0] if patch_size is None else patch_size
        self.channels = channels
        self.width: int = vit.embed_dim if width is None else width
        self.num_heads: int = vit.blocks[0].attn.num_heads if num_heads is None else num_heads
        self.decoder_heads = decoder_heads
        self.mask_ratio = mask_ratio
        self.normalize_pixels = normalize_pixels
        if self.patch_size < 1 or min(H, W) < 1 or H % self.patch_size or W % self.patch_size:
            raise ValueError(
                f"image size {H}x{W} is not divisible by the patch size {self.patch_size}: change one of them"
            )
        _check_heads("encoder", self.width, self.num_heads)
        _check_heads("decoder", decoder_width, decoder_heads)
        self.grid_size = (H // self.patch_size, W // self.patch_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.num_keep = num_kept(self.num_patches, mask_ratio)

        # Built without memory and filled by init_weights: no time goes into initialisations that are thrown
        # away, and the global generators stay as they are.
        device = torch.get_default_device()
        with torch.device("meta"):
            self.encoder: VisionTransformer = timm.create_model(  # pyright: ignore[reportAttributeAccessIssue]
                arch,
                pretrained=False,
                num_classes=0,
                img_size=self.image_size,
                patch_size=self.patch_size,
                in_chans=channels,
                embed_dim=width,
                depth=depth,
                num_heads=num_heads,
                mlp_ratio=mlp_ratio,
            )
            self.decoder_embed = nn.Linear(self.width, decoder_width)
            self.mask_token = nn.Parameter(torch.empty(1, 1, decoder_width))
            self.decoder_pos_embed = nn.Parameter(torch.empty(1, 1 + self.num_patches, decoder_width))
            blocks = (
                Block(decoder_width, decoder_heads, qkv_bias=True, norm_layer=LayerNorm) for _ in range(decoder_depth)
            )
            self.decoder_blocks = nn.Sequential(*blocks)
            self.decoder_norm = LayerNorm(decoder_width, eps=1e-6)
            self.decoder_pred = nn.Linear(decoder_width, self.patch_size**2 * channels)
        _, encoder_pos_embed = self._encoder_extras()
        encoder_pos_embed.requires_grad_(False)
        self.decoder_pos_embed.requires_grad_(False)
        if device.type != "meta":
            self.to_empty(device=device)
            self.init_weights(seed)

    def _encoder_extras(self) -> tuple[nn.Parameter, nn.Parameter]:
        token, table = self.encoder.cls_token, self.encoder.pos_embed
        assert token is not None, "a plain ViT has a class token"
        assert table is not None, "a plain ViT has a position table"
        return token, table

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Sets every parameter anew, as a function of the seed alone (the same on any device).

        Xavier-uniform for linears, the patch projection seen as one; N(0, 0.02) for class and mask token;
        biases 0, norms 1 and 0; sine-cosine position tables (the paper's appendix A.1 and its code).

        Args:
            seed: Of a generator of its own; global generators are not touched.
        """
        generator = torch.Generator("cpu").manual_seed(seed)
        for parameter in self.parameters():
            parameter.fill_(torch.nan)  # so that what is forgotten below shows itself
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                weight = torch.empty(module.weight.flatten(1).shape, device="cpu")
                nn.init.xavier_uniform_(weight, generator=generator)
                module.weight.copy_(weight.view(module.weight.shape))
            elif isinstance(module, nn.LayerNorm):
                module.weight.fill_(1.0)
            if isinstance(module, nn.Linear | nn.Conv2d | nn.LayerNorm) and module.bias is not None:
                module.bias.zero_()
        cls_token, encoder_pos_embed = self._encoder_extras()
        for token in (cls_token, self.mask_token):
            token.copy_(torch.empty(token.shape, device="cpu").normal_(std=0.02, generator=generator))
        for table in (encoder_pos_embed, self.decoder_pos_embed):
            table.copy_(sincos_table(self.grid_size, table.shape[2]))
        missed = [name for name, parameter in self.named_parameters() if parameter.isnan().any()]
        assert not missed, f"init_weights forgot {', '.join(missed)}"

    def patches(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        """Cuts images into ``patches_BNP`` (row, column, channel within a patch).

        Raises:
            ValueError: The images are not of this model's shape.
        """
        expected = [self.channels, *self.image_size]
        if list(images_BCHW.shape[1:]) != expected:
            raise ValueError(
                f"images of shape {list(images_BCHW.shape)} do not fit this model, that takes {expected} after "
                "the batch: resize them, or build the model with their channels and size"
            )
        return patchify(images_BCHW, self.patch_size)

    def encode(self, images_BCHW: torch.Tensor, keep_BK: torch.Tensor | None = None) -> torch.Tensor:
        """Encodes the visible patches only.

        Args:
            images_BCHW: Floating point, normalised as in training.
            keep_BK: int64 indices of the visible patches, in any order; None means all of them.

        Returns:
            ``latent`` [B, 1 + K, D] after the final norm: the class token, then the patches in the order of
            ``keep_BK``.
        """
        encoder, projection = self.encoder, self.encoder.patch_embed.proj
        cls_token, pos_embed = self._encoder_extras()
        position_1D, position_ND = pos_embed[0].tensor_split([1])
        patches_BKP, position_BKD = self.patches(images_BCHW), position_ND  # of all patches
        if keep_BK is not None:
            patches_BKP, position_BKD = take(patches_BKP, keep_BK), position_ND[keep_BK]
        # A convolution whose stride is its kernel is a linear layer on patches; its weight is [D, C, p, p].
        weight_DP = projection.weight.permute(0, 2, 3, 1).flatten(1)
        visible_BKD = nn.functional.linear(patches_BKP, weight_DP, projection.bias) + position_BKD
        cls_B1D = (cls_token + position_1D).expand(len(images_BCHW), -1, -1)
        return encoder.norm(encoder.blocks(torch.cat([cls_B1D, visible_BKD], dim=1)))

    def decode(self, latent: torch.Tensor, keep_BK: torch.Tensor, masked_BM: torch.Tensor) -> torch.Tensor:
        """Predicts the masked patches from the latent of the visible ones.

        The tokens are not put back into the image's order: every token carries its position, and attention
        does not see an order. The head runs on the masked tokens only.

        Args:
            latent: [B, 1 + K, D] from ``encode``.
            keep_BK: The indices given to ``encode``.
            masked_BM: int64 indices of the patches to predict.

        Returns:
            ``pred_BMP``: for each masked patch, in the order of ``masked_BM``, its pixels (normalised ones
            where the model predicts those).
        """
        position_1E, position_NE = self.decoder_pos_embed[0].tensor_split([1])
        visible = self.decoder_embed(latent)  # [B, 1 + K, E]
        cls_B1E = visible[:, :1] + position_1E
        visible_BKE = visible[:, 1:] + position_NE[keep_BK]
        masked_BME = self.mask_token + position_NE[masked_BM]
        tokens = self.decoder_blocks(torch.cat([cls_B1E, visible_BKE, masked_BME], dim=1))
        return self.decoder_pred(self.decoder_norm(tokens[:, -masked_BM.shape[1] :]))

    def loss(self, images_BCHW: torch.Tensor, pred_BMP: torch.Tensor, masked_BM: torch.Tensor) -> torch.Tensor:
        """Squared error of each sample: the mean over a patch's values, then over the masked patches.

        Args:
            images_BCHW: What was masked.
            pred_BMP: From ``decode``; compared in float32 whatever its dtype.
            masked_BM: The indices given to ``decode``.

        Returns:
            float32 ``loss_B``.
        """
        target_BMP = take(self.patches(images_BCHW), masked_BM).float()
        if self.normalize_pixels:
            target_BMP, _, _ = normalize_patches(target_BMP)
        return (pred_BMP.float() - target_BMP).square().mean(dim=(1, 2))

    def forward(
        self,
        images_BCHW: torch.Tensor,
        noise_BN: torch.Tensor | None = None,
        *,
        weight_B: torch.Tensor | None = None,
        denominator: float | torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """Masks, encodes, decodes, and compares with the masked patches.

        Args:
            images_BCHW: Floating point, normalised.
            noise_BN: The K patches with the smallest noise of each sample are kept; any sortable dtype.
                None draws it from the device's global generator.
            weight_B: Weight of each sample in the loss; 0 also silences what is not finite in a sample.
            denominator: What the sum of the weighted losses is divided by: the global batch. None means B.

        Returns:
            ``loss`` (float32 scalar), ``loss_B`` (float32, unweighted, but 0 where the weight is 0), ``pred``
            (``pred_BMP``), ``keep`` (``keep_BK``) and ``masked`` (``masked_BM``).
        """
        B = len(images_BCHW)
        if noise_BN is None:
            noise_BN = torch.rand(B, self.num_patches, device=images_BCHW.device)
        if weight_B is not None:
            # Not the loss alone: a NaN would come back through its sample's gradient, as 0 * NaN.
            images_BCHW = torch.where(weight_B[:, None, None, None] != 0, images_BCHW, 0.0)
        keep_BK, masked_BM = random_masking(noise_BN, self.num_keep)
        latent = self.encode(images_BCHW, keep_BK)
        pred_BMP = self.decode(latent, keep_BK, masked_BM)
        loss_B = self.loss(images_BCHW, pred_BMP, masked_BM)
        weighted_B = loss_B
        if weight_B is not None:
            loss_B = torch.where(weight_B != 0, loss_B, 0.0)
            weighted_B = loss_B * weight_B
        loss = weighted_B.sum() / (B if denominator is None else denominator)
        return {"loss": loss, "loss_B": loss_B, "pred": pred_BMP, "keep": keep_BK, "masked": masked_BM}

    def features(self, images_BCHW: torch.Tensor, pool: Literal["mean", "cls"] = "mean") -> torch.Tensor:
        """Features of whole images, for probes: all patches, after the final norm.

        Args:
            images_BCHW: Floating point, normalised as in training.
            pool: Mean of the patches, or the class token.

        Returns:
            [B, D].
        """
        latent = self.encode(images_BCHW)
        return latent[:, 0] if pool == "cls" else latent[:, 1:].mean(dim=1)
