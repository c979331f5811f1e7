"""The masked autoencoder of He et al. (arXiv 2111.06377) around a plain timm Vision Transformer.

Shapes: B batch, C H W image, N patches, K kept, M masked (K + M = N), P values a patch, Q values predicted for a
patch, D encoder width, E decoder width, S class tokens (1, unless asked for more). In a latent they come first, before
the patches.
"""

from collections.abc import Sequence
from typing import Any, Literal

import timm
import torch
from timm.layers.norm import LayerNorm
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from mae_core.architectures import check_patches
from mae_core.decoders import make_decoder_blocks
from mae_core.layers import linear, use_fast_layers
from mae_core.masking import Masking, random_masking, take
from mae_core.plain_vit import plain_vit, sincos_table
from mae_core.targets import make_target, patchify


def _check_heads(what: str, width: int, num_heads: int) -> None:
    if width < 4 or width % 4:
        fine = width // 4 * 4 + 4
        raise ValueError(f"{what} width {width} is not divisible by 4 (its position table is): choose {fine}")
    if num_heads < 1 or width % num_heads:
        fine = ", ".join(str(n) for n in range(1, min(width, 32) + 1) if width % n == 0)
        raise ValueError(f"{num_heads} {what} heads do not divide the {what} width {width}: choose one of {fine}")


def pooled(latent: torch.Tensor, class_tokens: int, pool: Literal["mean", "cls"]) -> torch.Tensor:
    """Features of whole images from their tokens: [B, S + K, D] to [B, D].

    Args:
        latent: The class tokens come first.
        class_tokens: S.
        pool: Mean of the patches, or of the class tokens.
    """
    if pool == "mean":
        return latent[:, class_tokens:].mean(dim=1)
    return latent[:, 0] if class_tokens == 1 else latent[:, :class_tokens].mean(dim=1)


class MaskedAutoencoder(nn.Module):
    """A ViT that sees a share of an image's patches, and a small decoder that predicts the others.

    ``encoder`` is a plain timm model (its keys in the state dict are timm's, behind ``encoder.``); the
    decoder's keys are those of the official checkpoints. Attributes for callers: ``image_size``,
    ``patch_size``, ``channels``, ``grid_size``, ``num_patches`` (N), ``num_keep`` (K), ``width`` (D),
    ``num_heads``, ``class_tokens`` (S), ``decoder_heads``, ``masking``, ``target``, ``mean``, ``std``, and ``options``:
    the arguments from ``class_tokens`` to ``loss_on``.
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
        class_tokens: int = 1,
        decoder: str = "transformer",
        decoder_width: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 16,
        mask: str = "random",
        mask_ratio: float = 0.75,
        mask_cell: int = 1,
        encoder_mask_tokens: bool = False,
        target: str = "raw",
        target_components: int = 96,
        loss_on: Literal["masked", "all"] = "masked",
        mean: Sequence[float] = (),
        std: Sequence[float] = (),
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
            class_tokens: S (Pixio has 8). Those after the first are timm's ``reg_token``, with positions as the first.
            decoder: The decoder's blocks, by their name in ``decoders.DECODERS``.
            decoder_width: Decoder width E, divisible by 4 and by the decoder's heads.
            decoder_depth: Decoder blocks.
            decoder_heads: Decoder attention heads, where there is attention.
            mask: Kind of the masks, by its name in ``masking.MASKS``.
            mask_ratio: Share of the patches that the encoder does not see.
            mask_cell: Side, in patches, of the cells that are masked or kept as a whole.
            encoder_mask_tokens: Put the mask tokens into the encoder already, in place of the masked patches, and none
                into the decoder: the slow baseline of the paper's table 1c.
            target: What is predicted, by its name in ``targets.TARGETS``.
            target_components: Principal components of a patch, for the target of that kind.
            loss_on: The masked patches, or all of them.
            mean: By which each channel of its images is normalised before they come here, of values in 0..1; its
                files say so. Empty: not known.
            std: As mean.
            seed: Of the initial weights.

        Raises:
            ValueError: An unknown or unfit architecture, or sizes that do not go together.
        """
        super().__init__()
        vit = plain_vit(arch)
        H, W = (image_size, image_size) if isinstance(image_size, int) else image_size
        self.image_size = (H, W)
        self.patch_size: int = vit.patch_embed.patch_size[0] if patch_size is None else patch_size
        self.channels = channels
        self.mean, self.std = tuple(mean), tuple(std)
        self.width: int = vit.embed_dim if width is None else width
        self.num_heads: int = vit.blocks[0].attn.num_heads if num_heads is None else num_heads
        self.class_tokens = class_tokens
        self.decoder_heads = decoder_heads
        self.loss_on = loss_on
        self.options: dict[str, Any] = {
            "class_tokens": class_tokens, "decoder": decoder, "decoder_width": decoder_width,
            "decoder_depth": decoder_depth, "decoder_heads": decoder_heads, "mask": mask, "mask_ratio": mask_ratio,
            "mask_cell": mask_cell, "encoder_mask_tokens": encoder_mask_tokens, "target": target,
            "target_components": target_components, "loss_on": loss_on,
        }  # fmt: skip
        if class_tokens < 1:
            raise ValueError(f"{class_tokens} class tokens: choose at least 1")
        if loss_on not in ("masked", "all"):
            raise ValueError(f"loss on '{loss_on}' patches: choose masked or all")
        check_patches((H, W), self.patch_size)
        _check_heads("encoder", self.width, self.num_heads)
        _check_heads("decoder", decoder_width, decoder_heads)
        self.grid_size = (H // self.patch_size, W // self.patch_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.masking = Masking(mask, self.grid_size, mask_ratio, mask_cell)
        self.num_keep = self.masking.num_keep

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
                reg_tokens=class_tokens - 1,
            )
            self.decoder_embed = nn.Linear(self.width, decoder_width)
            # One of the two: a parameter without a gradient would stop an all-reduce.
            self.encoder_mask_token = nn.Parameter(torch.empty(1, 1, self.width)) if encoder_mask_tokens else None
            self.mask_token = None if encoder_mask_tokens else nn.Parameter(torch.empty(1, 1, decoder_width))
            num_tokens = class_tokens + self.num_patches
            self.decoder_pos_embed = nn.Parameter(torch.empty(1, num_tokens, decoder_width))
            self.decoder_blocks = make_decoder_blocks(
                decoder, width=decoder_width, depth=decoder_depth, num_heads=decoder_heads, num_tokens=num_tokens
            )
            self.decoder_norm = LayerNorm(decoder_width, eps=1e-6)
            self.target = make_target(target, self.patch_size**2 * channels, target_components)
            self.decoder_pred = nn.Linear(decoder_width, self.target.size)
        use_fast_layers(self)
        _, encoder_pos_embed = self._encoder_extras()
        encoder_pos_embed.requires_grad_(False)
        self.decoder_pos_embed.requires_grad_(False)
        if device.type != "meta":
            self.to_empty(device=device)
            self.init_weights(seed)

    def _encoder_extras(self) -> tuple[list[torch.Tensor], nn.Parameter]:
        """The parameters that hold the class tokens, and the position table."""
        table = self.encoder.pos_embed
        assert table is not None, "a plain ViT has a position table"
        return [token for token in (self.encoder.cls_token, self.encoder.reg_token) if token is not None], table

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Sets every parameter anew, as a function of the seed alone (the same on any device).

        Xavier-uniform for linears, the patch projection seen as one; N(0, 0.02) for class and mask tokens;
        biases 0, norms 1 and 0; sine-cosine position tables (the paper's appendix A.1 and its code). Buffers, which
        only a fitted target has, are NaN until they are filled.

        Args:
            seed: Of a generator of its own; global generators are not touched.
        """
        generator = torch.Generator("cpu").manual_seed(seed)
        for tensor in (*self.parameters(), *self.buffers()):
            tensor.fill_(torch.nan)  # so that what is forgotten below shows itself
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                weight = torch.empty(module.weight.flatten(1).shape, device="cpu")
                nn.init.xavier_uniform_(weight, generator=generator)
                module.weight.copy_(weight.view(module.weight.shape))
            elif isinstance(module, nn.LayerNorm):
                module.weight.fill_(1.0)
            if isinstance(module, nn.Linear | nn.Conv2d | nn.LayerNorm) and module.bias is not None:
                module.bias.zero_()
        class_tokens, encoder_pos_embed = self._encoder_extras()
        for token in (*class_tokens, self.mask_token, self.encoder_mask_token):
            if token is not None:
                token.copy_(torch.empty(token.shape, device="cpu").normal_(std=0.02, generator=generator))
        for table in (encoder_pos_embed, self.decoder_pos_embed):
            table.copy_(sincos_table(self.grid_size, table.shape[2], self.class_tokens))
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

    def encode(
        self,
        images_BCHW: torch.Tensor,
        keep_BK: torch.Tensor | None = None,
        masked_BM: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Encodes the visible patches; mask tokens beside them only in a model that was asked for these.

        Args:
            images_BCHW: Floating point, normalised as in training.
            keep_BK: int64 indices of the visible patches, in any order; None means all of them.
            masked_BM: Those of the masked patches. Without mask tokens in the encoder they are not looked at.

        Returns:
            ``latent`` [B, S + K, D] after the final norm: the class tokens, then the patches in the order of
            ``keep_BK``; with mask tokens [B, S + N, D], then theirs in the order of ``masked_BM``.
        """
        encoder, projection = self.encoder, self.encoder.patch_embed.proj
        class_tokens, pos_embed = self._encoder_extras()
        position_SD, position_ND = pos_embed[0].tensor_split([self.class_tokens])
        patches_BKP, position_BKD = self.patches(images_BCHW), position_ND  # of all patches
        if keep_BK is not None:
            patches_BKP, position_BKD = take(patches_BKP, keep_BK), position_ND[keep_BK]
        # A convolution whose stride is its kernel is a linear layer on patches; its weight is [D, C, p, p].
        weight_DP = projection.weight.permute(0, 2, 3, 1).flatten(1)
        visible_BKD = linear(patches_BKP, weight_DP, projection.bias) + position_BKD
        class_BSD = (torch.cat(class_tokens, dim=1) + position_SD).expand(len(images_BCHW), -1, -1)
        tokens = [class_BSD, visible_BKD]
        if self.encoder_mask_token is not None and masked_BM is not None:
            tokens.append(self.encoder_mask_token + position_ND[masked_BM])
        return encoder.norm(encoder.blocks(torch.cat(tokens, dim=1)))

    def decode(
        self, latent: torch.Tensor, keep_BK: torch.Tensor, masked_BM: torch.Tensor, *, visible: bool = False
    ) -> torch.Tensor:
        """Predicts the masked patches from the latent of the visible ones.

        The tokens are not put back into the image's order: every token carries its position, and attention
        does not see an order. The head runs on the tokens of what is predicted only.

        Args:
            latent: From ``encode``.
            keep_BK: The indices given to ``encode``.
            masked_BM: int64 indices of the patches to predict.
            visible: Also predict the visible patches.

        Returns:
            ``pred_BMQ``: for each masked patch, in the order of ``masked_BM``, its pixels, or what the target makes
            of them. With the visible ones ``pred_BNQ``: these come first, in the order of ``keep_BK``.
        """
        S, K = self.class_tokens, keep_BK.shape[1]
        position_SE, position_NE = self.decoder_pos_embed[0].tensor_split([S])
        seen = self.decoder_embed(latent)  # [B, S + K, E], or [B, S + N, E] with mask tokens in the encoder
        class_BSE = seen[:, :S] + position_SE
        visible_BKE = seen[:, S : S + K] + position_NE[keep_BK]
        masked = seen[:, S + K :] if self.mask_token is None else self.mask_token  # [B, M, E] or [1, 1, E]
        masked_BME = masked + position_NE[masked_BM]
        order_BN = torch.cat([keep_BK, masked_BM], dim=1)
        tokens = self.decoder_blocks(torch.cat([class_BSE, visible_BKE, masked_BME], dim=1), order_BN)
        return self.decoder_pred(self.decoder_norm(tokens[:, S if visible else S + K :]))

    def loss(self, images_BCHW: torch.Tensor, pred_BMQ: torch.Tensor, index_BM: torch.Tensor) -> torch.Tensor:
        """Squared error of each sample: the mean over a patch's values, then over the predicted patches.

        Args:
            images_BCHW: What was masked.
            pred_BMQ: From ``decode``; compared in float32 whatever its dtype.
            index_BM: Which patches these are, of the masked ones or of all.

        Returns:
            float32 ``loss_B``.
        """
        target_BMQ = self.target(take(self.patches(images_BCHW), index_BM).float())
        return (pred_BMQ.float() - target_BMQ).square().mean(dim=(1, 2))

    def forward(
        self,
        images_BCHW: torch.Tensor,
        noise_BN: torch.Tensor | None = None,
        *,
        weight_B: torch.Tensor | None = None,
        denominator: float | torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """Masks, encodes, decodes, and compares with the masked patches, or with all.

        Args:
            images_BCHW: Floating point, normalised.
            noise_BN: The K patches with the smallest noise of each sample are kept; any sortable dtype, as from
                ``masking.noise``. None draws keys for that from the device's global generator.
            weight_B: Weight of each sample in the loss; 0 also silences what is not finite in a sample.
            denominator: What the sum of the weighted losses is divided by: the global batch. None means B.

        Returns:
            ``loss`` (float32 scalar), ``loss_B`` (float32, unweighted, but 0 where the weight is 0), ``pred``
            (``pred_BMQ``, of the masked patches), ``keep`` (``keep_BK``) and ``masked`` (``masked_BM``).
        """
        B = len(images_BCHW)
        if noise_BN is None:
            noise_BN = self.masking.noise(torch.randint(2**63 - 1, (B,), device=images_BCHW.device))
        if weight_B is not None:
            # Not the loss alone: a NaN would come back through its sample's gradient, as 0 * NaN.
            images_BCHW = torch.where(weight_B[:, None, None, None] != 0, images_BCHW, 0.0)
        keep_BK, masked_BM = random_masking(noise_BN, self.num_keep)
        latent = self.encode(images_BCHW, keep_BK, masked_BM)
        if self.loss_on == "all":
            pred_BNQ = self.decode(latent, keep_BK, masked_BM, visible=True)
            loss_B = self.loss(images_BCHW, pred_BNQ, torch.cat([keep_BK, masked_BM], dim=1))
            pred_BMQ = pred_BNQ[:, self.num_keep :]
        else:
            pred_BMQ = self.decode(latent, keep_BK, masked_BM)
            loss_B = self.loss(images_BCHW, pred_BMQ, masked_BM)
        weighted_B = loss_B
        if weight_B is not None:
            loss_B = torch.where(weight_B != 0, loss_B, 0.0)
            weighted_B = loss_B * weight_B
        loss = weighted_B.sum() / (B if denominator is None else denominator)
        return {"loss": loss, "loss_B": loss_B, "pred": pred_BMQ, "keep": keep_BK, "masked": masked_BM}

    def features(self, images_BCHW: torch.Tensor, pool: Literal["mean", "cls"] = "mean") -> torch.Tensor:
        """Features of whole images, for probes: all patches, after the final norm.

        Args:
            images_BCHW: Floating point, normalised as in training.
            pool: Mean of the patches, or the class token; of several class tokens their mean, as Pixio recommends.

        Returns:
            [B, D].
        """
        return pooled(self.encode(images_BCHW), self.class_tokens, pool)
