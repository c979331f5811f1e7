"""The method as its authors' code goes about it: what benchmarks hold ours against."""

from typing import Any

import torch
from torch import nn

from mae_core.model import MaskedAutoencoder


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
