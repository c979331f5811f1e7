"""Pictures of what a model makes of chosen images: reconstructions, attention, shared features, neighbours."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from mae_core.images import normalize
from mae_core.looking import cls_attention, nearest, pca_colours
from mae_core.masking import random_masking
from mae_core.model import MaskedAutoencoder
from mae_core.pictures import reconstruction_sheet
from mae_core.randomness import mask_keys
from mae_core.sheets import heat_overlay, neighbour_sheet, titled_grid
from pipelines.data.lookup import read_samples
from pipelines.data.readers import View
from pipelines.data.shards import Manifest
from pipelines.errors import UserError

HEAD = 28  # pixels above each picture, for the line that says what it is
_HEAD_SIZE = 14
_ENCODED_AT_ONCE = 32


@dataclass(frozen=True)
class Subject:
    """A model, and what its images need.

    Args:
        model: In evaluation mode.
        title: What it is, as pictures say it.
        mean: Of each channel, of pixels in [0, 1].
        std: As ``mean``.
        view: Size and crop.
        pool: What the features of an image are.
        has_decoder: Whether reconstructions mean something.
    """

    model: MaskedAutoencoder
    title: str
    mean: Sequence[float]
    std: Sequence[float]
    view: View
    pool: Literal["mean", "cls"] = "mean"
    has_decoder: bool = True

    def normalized(self, images_BHWC: np.ndarray) -> torch.Tensor:
        """Pixels as the model takes them, on its device."""
        device = self.model.decoder_pos_embed.device
        return normalize(torch.from_numpy(images_BHWC).to(device), self.mean, self.std)

    def apply(self, function: Callable[[torch.Tensor], torch.Tensor], images_BHWC: np.ndarray) -> torch.Tensor:
        """A function of normalised images over some at a time; float32 on the CPU."""
        starts = range(0, len(images_BHWC), _ENCODED_AT_ONCE)
        parts = [function(self.normalized(images_BHWC[start : start + _ENCODED_AT_ONCE])) for start in starts]
        return torch.cat([part.float().cpu() for part in parts])

    def headed(self, picture: Image.Image, text: str) -> Image.Image:
        """The picture under a line that says which model made it, and what it is."""
        font, line = ImageFont.load_default(_HEAD_SIZE), f"{self.title}: {text}"
        width = max(picture.width, int(font.getlength(line)) + 32)
        page = Image.new("RGB", (width, picture.height + HEAD), "white")
        page.paste(picture, (0, HEAD))
        ImageDraw.Draw(page).text((16, HEAD // 2 + 4), line, (32, 32, 32), font, anchor="lm")
        return page


@torch.inference_mode()
def draw_reconstruction(
    subject: Subject, images_BHWC: np.ndarray, sample_B: np.ndarray, *, mask_ratio: float, mask_seed: int
) -> Image.Image:
    """Rows of masked, reconstructed and original; the masks are those of training in epoch 0 with that seed."""
    model = subject.model
    masking = dataclasses.replace(model.masking, mask_ratio=mask_ratio)
    noise_BN = masking.noise(mask_keys(mask_seed, np.zeros_like(sample_B), sample_B))
    device = model.decoder_pos_embed.device
    keep_BK, masked_BM = (index.to(device) for index in random_masking(noise_BN, masking.num_keep))
    parts = []
    for start in range(0, len(sample_B), _ENCODED_AT_ONCE):
        part = slice(start, start + _ENCODED_AT_ONCE)
        latent = model.encode(subject.normalized(images_BHWC[part]), keep_BK[part], masked_BM[part])
        parts.append(model.decode(latent, keep_BK[part], masked_BM[part]).float().cpu())
    sheet = reconstruction_sheet(
        subject.normalized(images_BHWC),
        torch.cat(parts),
        masked_BM,
        patch_size=model.patch_size,
        mean=subject.mean,
        std=subject.std,
        target=model.target,
    )
    hidden = f"{masked_BM.shape[1]} of {model.num_patches} patches masked"
    return subject.headed(sheet, f"mask ratio {mask_ratio:g}, {hidden}, mask seed {mask_seed}")


@torch.inference_mode()
def draw_attention(subject: Subject, images_BHWC: np.ndarray, titles: Sequence[str], *, heads: bool) -> Image.Image:
    """Rows of an image and its heat map of the class token's attention; one a head too, where asked for."""
    attention_BhHW = subject.apply(lambda images_BCHW: cls_attention(subject.model, images_BCHW), images_BHWC)
    maps = {"mean of heads": attention_BhHW.mean(dim=1)}
    if heads:
        maps |= {f"head {h + 1}": attention_BhHW[:, h] for h in range(attention_BhHW.shape[1])}
    rows = [
        [image_HWC, *(heat_overlay(image_HWC, heat_BHW[row]) for heat_BHW in maps.values())]
        for row, image_HWC in enumerate(_colour(images_BHWC))
    ]
    return subject.headed(titled_grid(rows, titles, ["image", *maps]), "attention of the class token, last block")


@torch.inference_mode()
def draw_pca(subject: Subject, images_BHWC: np.ndarray, titles: Sequence[str]) -> Image.Image:
    """Rows of an image and its patches, coloured by the first three principal components over all the images."""
    model = subject.model
    patches_BND = subject.apply(lambda images_BCHW: model.encode(images_BCHW)[:, model.class_tokens :], images_BHWC)
    colours_BHWC = pca_colours(patches_BND, model.grid_size)
    colours_BHWC = colours_BHWC.repeat(model.patch_size, axis=1).repeat(model.patch_size, axis=2)
    rows = list(zip(_colour(images_BHWC), colours_BHWC, strict=True))
    return subject.headed(titled_grid(rows, titles, ["image", "features"]), "PCA of the patches' features")


@torch.inference_mode()
def find_neighbours(
    subject: Subject, images_BHWC: np.ndarray, sample_B: np.ndarray, manifest: Manifest, base: Sequence[int], k: int
) -> tuple[np.ndarray, torch.Tensor, list[dict[str, str]]]:
    """The most similar samples of each image, by cosine similarity of their features.

    Args:
        subject: The model.
        images_BHWC: The images.
        sample_B: Their ids; none is a neighbour of itself.
        manifest: Where to find neighbours.
        base: Ids of the samples to find them among.
        k: Neighbours of an image; fewer where there are not as many.

    Returns:
        int64 ids and float32 similarities, both [B, K], the most similar first, and the samples that could not be read.

    Raises:
        UserError: There is nothing to compare with.
    """

    def features(images_BCHW: torch.Tensor) -> torch.Tensor:
        return subject.model.features(images_BCHW, subject.pool)

    parts, ids, skipped = [], [], []
    for read in read_samples(manifest, base, subject.view):
        skipped += read.skipped
        if len(read.sample_B):
            parts.append(subject.apply(features, read.images_BHWC))
            ids.append(read.sample_B)
    base_X = np.concatenate(ids) if ids else np.empty(0, np.int64)
    k = min(k, len(base_X) - int(np.isin(sample_B, base_X).any()))
    if k < 1:
        raise UserError(f"neighbours: {len(base_X)} images could be read to find them among: give more images")
    index_BX, similarity_BX = nearest(subject.apply(features, images_BHWC), torch.cat(parts), k + 1)
    id_BX = base_X[index_BX.numpy()]
    # The image itself is in the base, or it is not: of one more than is needed, the first others stay.
    place_BK = np.argsort(id_BX == sample_B[:, None], axis=1, kind="stable")[:, :k]
    return np.take_along_axis(id_BX, place_BK, 1), similarity_BX.gather(1, torch.from_numpy(place_BK)), skipped


def draw_neighbours(
    subject: Subject, images_BHWC: np.ndarray, manifest: Manifest, id_BK: np.ndarray, similarity_BK: torch.Tensor
) -> Image.Image:
    """Rows of an image and the samples that ``find_neighbours`` found."""
    unique = np.unique(id_BK)
    reads = list(read_samples(manifest, unique.tolist(), subject.view))
    found = np.concatenate([read.sample_B for read in reads])
    assert np.array_equal(found, unique), "a neighbour that was read before cannot be read again"
    images_XHWC = np.concatenate([read.images_BHWC for read in reads])
    sheet = neighbour_sheet(images_BHWC, images_XHWC[np.searchsorted(unique, id_BK)], similarity_BK)
    return subject.headed(sheet, "nearest by cosine similarity of the images' features")


def _colour(images_BHWC: np.ndarray) -> np.ndarray:
    return np.broadcast_to(images_BHWC, (*images_BHWC.shape[:3], 3))
