import math

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from mae_core.probes import effective_rank, knn_predict, linear_probe, split_indices, top1


@pytest.fixture(scope="module")
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    pixels, labels = load_digits(return_X_y=True)
    return torch.from_numpy(pixels).float(), torch.from_numpy(labels)


def slow_knn(train: np.ndarray, labels: np.ndarray, query: np.ndarray, k: int, temperature: float) -> list[int]:
    predicted = []
    for row in query:
        cosine = train @ row / np.linalg.norm(train, axis=1) / np.linalg.norm(row)
        votes = np.zeros(labels.max() + 1)
        for near in np.argsort(-cosine)[:k]:
            votes[labels[near]] += math.exp(cosine[near] / temperature)
        predicted.append(int(votes.argmax()))
    return predicted


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (20, 0.07), (20, 1.0), (1000, 0.02)])
def test_knn_is_the_slow_one(k: int, temperature: float) -> None:
    rng = np.random.default_rng(0)
    train, query = rng.normal(size=(300, 8)), rng.normal(size=(50, 8))
    labels = rng.integers(0, 5, 300)
    predicted = knn_predict(
        torch.from_numpy(train),
        torch.from_numpy(labels),
        torch.from_numpy(query),
        num_classes=5,
        k=k,
        temperature=temperature,
        block=7 * 300,  # the last block is not whole
    )
    assert predicted.tolist() == slow_knn(train, labels, query, k, temperature)


def test_knn_reads_digits(digits: tuple[torch.Tensor, torch.Tensor]) -> None:
    pixels, labels = digits
    train, test = split_indices(len(pixels), 0.3, seed=0)
    predicted = knn_predict(pixels[train], labels[train], pixels[test], num_classes=10)
    assert top1(predicted, labels[test]) > 95
    doubled = knn_predict(100 * pixels[train].double(), labels[train], pixels[test].half(), num_classes=10)
    assert (doubled == predicted).float().mean() > 0.99  # the length of a feature does not matter


def test_a_linear_probe_is_as_good_as_logistic_regression(digits: tuple[torch.Tensor, torch.Tensor]) -> None:
    pixels, labels = digits
    rest, test = split_indices(len(pixels), 0.3, seed=1)
    train, val = split_indices(len(rest), 0.2, seed=2)
    train, val = rest[train], rest[val]
    probe = linear_probe(pixels[train], labels[train], pixels[val], labels[val], num_classes=10, seed=0)
    reference = LogisticRegression(max_iter=300).fit(pixels[train] / 16, labels[train])
    accuracy = top1(probe.predict(pixels[test]), labels[test])
    assert accuracy > 100 * reference.score(pixels[test] / 16, labels[test]) - 1.5
    assert probe.val_top1[probe.learning_rate] == max(probe.val_top1.values())
    assert probe.val_top1[probe.learning_rate] == top1(probe.predict(pixels[val]), labels[val])


def test_learning_rates_train_apart_and_as_sgd_does() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(96, 6, generator=generator)
    labels = (features @ torch.randn(6, 3, generator=generator)).argmax(dim=1)
    rates, epochs = (0.05, 0.3, math.inf), 4
    options = {"num_classes": 3, "epochs": epochs, "batch_size": 96, "seed": 0}
    data = (features[:64], labels[:64], features[64:], labels[64:])
    probe = linear_probe(*data, learning_rates=rates, **options)
    assert probe.learning_rate in rates[:2]  # one that diverges spoils neither its neighbours nor the choice
    alone = linear_probe(*data, learning_rates=[probe.learning_rate], **options)
    torch.testing.assert_close(alone.weight, probe.weight)
    torch.testing.assert_close(alone.bias, probe.bias)

    # PyTorch's own BatchNorm, cross-entropy and SGD; one batch an epoch, so that the order does not count.
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(6, affine=False, eps=1e-6), torch.nn.Linear(6, 3))
    torch.nn.init.zeros_(model[1].weight)  # pyright: ignore
    torch.nn.init.zeros_(model[1].bias)  # pyright: ignore
    optimizer = torch.optim.SGD(model.parameters(), probe.learning_rate, momentum=0.9)
    for step in range(epochs):  # too few steps for a warm-up
        optimizer.param_groups[0]["lr"] = probe.learning_rate * (1 + math.cos(math.pi * step / epochs)) / 2
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(features[:64]), labels[:64]).backward()
        optimizer.step()
    torch.testing.assert_close(probe.weight, model[1].weight.detach(), atol=1e-5, rtol=1e-4)  # pyright: ignore
    torch.testing.assert_close(probe.bias, model[1].bias.detach(), atol=1e-5, rtol=1e-4)  # pyright: ignore


def test_probes_repeat_themselves_and_leave_the_generators_alone(
    digits: tuple[torch.Tensor, torch.Tensor],
) -> None:
    pixels, labels = digits
    before = torch.get_rng_state()
    data = (pixels[:900], labels[:900], pixels[900:], labels[900:])
    first, second = (linear_probe(*data, num_classes=10, epochs=3, seed=5) for _ in range(2))
    other = linear_probe(*data, num_classes=10, epochs=3, seed=6)
    assert torch.equal(first.weight, second.weight)
    assert first.val_top1 == second.val_top1
    assert not torch.equal(first.weight, other.weight)
    assert torch.equal(before, torch.get_rng_state())


def test_features_that_never_vary_do_no_harm(digits: tuple[torch.Tensor, torch.Tensor]) -> None:
    pixels, labels = digits
    flat = torch.full((len(pixels), 3), 1e4) * torch.tensor([1.0, -1 / 3, 0.0])
    flat[::2, 0] += 0.001  # the last bit of a float32, and no more
    wider = torch.cat((pixels, flat), dim=1)
    probes = [
        linear_probe(x[:1200], labels[:1200], x[1200:1500], labels[1200:1500], num_classes=10, epochs=20)
        for x in (pixels, wider)
    ]
    wider[1500:, -3:] += 50  # nor where they vary later
    plain, with_flat = (p.predict(x[1500:]) for p, x in zip(probes, (pixels, wider), strict=True))
    assert (plain == with_flat).float().mean() > 0.99


def test_top1_is_a_percentage() -> None:
    assert top1(torch.tensor([0, 1, 2, 3]), torch.tensor([0, 1, 2, 0])) == 75.0
    with pytest.raises(ValueError, match="0 predictions"):
        top1(torch.zeros(0), torch.zeros(0))
    with pytest.raises(ValueError, match="2 predictions for 1 labels"):
        top1(torch.zeros(2), torch.zeros(1))


def test_bad_features_and_labels_are_refused() -> None:
    good, labels = torch.ones(6, 3), torch.tensor([0, 1, 2, 0, 1, 2])
    for value in (math.nan, math.inf):
        bad = good.clone()
        bad[2, 1] = value
        with pytest.raises(ValueError, match="train features are not finite in 1 of 6"):
            knn_predict(bad, labels, good, num_classes=3)
        with pytest.raises(ValueError, match="validation features are not finite"):
            linear_probe(good, labels, bad, labels, num_classes=3)
        with pytest.raises(ValueError, match="not finite"):
            effective_rank(bad)
    with pytest.raises(ValueError, match="expected 0 to 1"):
        knn_predict(good, labels, good, num_classes=2)
    with pytest.raises(ValueError, match="expected 0 to 2"):
        linear_probe(good, labels, good, labels - 1, num_classes=3)
    with pytest.raises(ValueError, match="labels for 6 samples"):
        knn_predict(good, labels[:5], good, num_classes=3)
    with pytest.raises(ValueError, match="4 wide"):
        knn_predict(good, labels, torch.ones(2, 4), num_classes=3)
    with pytest.raises(ValueError, match="not empty"):
        knn_predict(good[:0], labels[:0], good, num_classes=3)


@pytest.mark.parametrize("num", [2, 3, 10, 5000])
@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.999])
def test_a_split_has_two_sides(num: int, share: float) -> None:
    train, val = split_indices(num, share, seed=0)
    assert len(train) > 0
    assert len(val) > 0
    np.testing.assert_array_equal(np.sort(np.concatenate((train, val))), np.arange(num))
    assert abs(len(val) - num * share) <= 1 + 5 * (num * share * (1 - share)) ** 0.5


def test_an_id_stays_on_its_side_when_data_is_added() -> None:
    _, val = split_indices(5000, 0.1, seed=3)
    _, more = split_indices(8000, 0.1, seed=3)
    np.testing.assert_array_equal(val, more[more < 5000])
    assert set(val.tolist()) != set(split_indices(5000, 0.1, seed=4)[1].tolist())
    for num, share in ((1, 0.5), (10, 0.0), (10, 1.0)):
        with pytest.raises(ValueError, match="cannot be split"):
            split_indices(num, share, seed=0)


def test_effective_rank_counts_directions() -> None:
    generator = torch.Generator().manual_seed(0)
    orthogonal = torch.linalg.qr(torch.randn(200, 16, generator=generator))[0]
    assert effective_rank(orthogonal) == pytest.approx(16, abs=1e-3)
    assert effective_rank(orthogonal[:, :1] @ torch.ones(1, 16)) == pytest.approx(1, abs=1e-3)
    assert effective_rank(torch.zeros(5, 4)) == 0
    features = torch.randn(30, 40, generator=generator) * torch.logspace(0, -2, 40)
    singular = torch.linalg.svdvals(features.double())
    share = singular / singular.sum()
    assert effective_rank(features) == pytest.approx((-share * share.log()).sum().exp().item(), rel=1e-4)
    assert effective_rank(1000 * features) == pytest.approx(effective_rank(features), rel=1e-5)
