"""Targets: what is predicted, and back; the principal components against scikit-learn's."""

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from mae_core.targets import fit_pca, make_target


def patches(num=600, values=12, seed=0):
    """Patches of very different variances, not around 0."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(values, values, generator=generator) * torch.logspace(0, -1, values)[:, None]
    return torch.randn(num, values, generator=generator) @ mixed + 3


def test_components_are_scikit_learns():
    patches_XP = patches()
    mean_P, basis_PQ = fit_pca(patches_XP.split(170), 5)
    theirs = PCA(5).fit(patches_XP.double().numpy())
    torch.testing.assert_close(mean_P, torch.from_numpy(theirs.mean_).float())
    expected_PQ = torch.from_numpy(np.asarray(theirs.components_)).T.float()
    torch.testing.assert_close((basis_PQ * expected_PQ).sum(dim=0).abs(), torch.ones(5), rtol=1e-4, atol=0)


def test_a_fit_has_one_sign_and_no_order_of_its_parts():
    patches_XP = patches()
    mean_P, basis_PQ = fit_pca([patches_XP], 12)
    assert (basis_PQ.gather(0, basis_PQ.abs().argmax(dim=0, keepdim=True)) > 0).all()
    # Turned around its mean every component may turn with it, and the sign says which way it was.
    for other in (patches_XP.flip(0).split(99), [2 * patches_XP.mean(dim=0) - patches_XP]):
        again_P, again_PQ = fit_pca(other, 12)
        torch.testing.assert_close(again_P, mean_P)
        torch.testing.assert_close(again_PQ, basis_PQ, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["raw", "normalized", "pca"])
def test_a_whole_prediction_goes_back_into_pixels(kind):
    target, patches_BNP = make_target(kind, 12, 12), patches().unflatten(0, (6, 100))
    if target.needs_fit:
        target.fit([patches(seed=1)])
    values = target(patches_BNP)
    assert values.shape == (6, 100, target.size)
    torch.testing.assert_close(target.pixels(values, patches_BNP), patches_BNP, rtol=1e-4, atol=1e-4)


def test_fewer_components_are_the_nearest_patch_that_they_can_make():
    patches_XP = patches()
    target = make_target("pca", 12, 4)
    target.fit([patches_XP])
    values_XQ = target(patches_XP)
    assert values_XQ.shape == (600, 4)
    assert (values_XQ.var(dim=0).diff() < 0).all(), "the largest come first"
    error = (target.pixels(values_XQ, patches_XP) - patches_XP).square().sum(dim=1).mean()
    left = torch.linalg.eigvalsh(patches_XP.double().T.cov(correction=0))[:8].sum()
    assert error.item() == pytest.approx(left.item(), rel=1e-3)


def test_bfloat16_does_not_round_the_target():
    target = make_target("pca", 12, 4)
    target.fit([patches()])
    patches_XP = patches(seed=1)
    expected = target(patches_XP)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(target(patches_XP), expected)


def test_the_fit_is_kept_with_the_weights():
    target, other = make_target("pca", 12, 4), make_target("pca", 12, 4)
    target.fit([patches()])
    other.load_state_dict(target.state_dict())
    assert torch.equal(other(patches(seed=1)), target(patches(seed=1)))
    assert not make_target("normalized", 12, 4).state_dict()


def test_what_cannot_be_fitted_is_told():
    with pytest.raises(ValueError, match=r"96 target components of patches of 48 values: choose 1 to 48"):
        make_target("pca", 48, 96)
    with pytest.raises(ValueError, match="choose raw, normalized, pca"):
        make_target("tokens", 48, 1)
    with pytest.raises(ValueError, match="two patches or more"):
        fit_pca([], 1)
    with pytest.raises(ValueError, match="finite"):
        fit_pca([torch.full((9, 4), torch.nan)], 1)
