"""What frozen features are worth: nearest neighbours, a linear classifier, and their effective rank.

N training samples, M other samples, D feature width, E feature width and bias, C classes, L learning rates,
B batch, K neighbours. Everything runs where its features lie and is a pure function of its arguments.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mae_core.randomness import Purpose, hash_u64, uniform

LEARNING_RATES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)

_ROWS = 1 << 16
_MOMENTUM = 0.9
_WARMUP_SHARE = 0.1
# Of BatchNorm, under the root; the official code's.
_EPSILON = 1e-6


def knn_predict(
    train_ND: torch.Tensor,
    labels_N: torch.Tensor,
    query_MD: torch.Tensor,
    *,
    num_classes: int,
    k: int = 20,
    temperature: float = 0.07,
    block: int = 1 << 24,
) -> torch.Tensor:
    """Classifies by the k nearest training samples, weighted (Wu et al., CVPR 2018).

    Nearness is cosine similarity; a neighbour votes for its class with ``exp(similarity / temperature)``.

    Args:
        train_ND: Features with known labels.
        labels_N: int64 in ``[0, num_classes)``.
        query_MD: Features to classify.
        num_classes: C.
        k: Neighbours that vote; all where there are fewer.
        temperature: The smaller, the more the nearest count.
        block: Similarities held at once; bounds the memory (64 MiB by default).

    Returns:
        int64 labels [M] on the device of the features.

    Raises:
        ValueError: Features are not finite or do not fit together, or a label is out of range.
    """
    train_ND, query_MD = _checked(train_ND, "train"), _checked(query_MD, "query")
    labels_N = _checked_labels(labels_N, train_ND, num_classes)
    if query_MD.shape[1] != train_ND.shape[1]:
        raise ValueError(f"query features are {query_MD.shape[1]} wide, train features {train_ND.shape[1]}")
    if k < 1 or temperature <= 0:
        raise ValueError(f"k is {k} and temperature {temperature}: k must be at least 1, temperature above 0")
    unit_DN = torch.nn.functional.normalize(train_ND, dim=1).T
    predicted = []
    for rows_QD in torch.nn.functional.normalize(query_MD, dim=1).split(max(1, block // len(train_ND))):
        similarity_QK, nearest_QK = (rows_QD @ unit_DN).topk(min(k, len(train_ND)), dim=1)
        # Relative to the nearest: the same order of the classes, and no temperature overflows.
        weight_QK = ((similarity_QK - similarity_QK[:, :1]) / temperature).exp()
        votes_QC = rows_QD.new_zeros(len(rows_QD), num_classes)
        row_Q = torch.arange(len(rows_QD), device=rows_QD.device)
        # One neighbour after the other: a scatter of all at once adds in no fixed order on a GPU.
        for label_Q, weight_Q in zip(labels_N[nearest_QK].T, weight_QK.T, strict=True):
            votes_QC[row_Q, label_Q] += weight_Q
        predicted.append(votes_QC.argmax(dim=1))
    return torch.cat(predicted)


def linear_probe(
    train_ND: torch.Tensor,
    labels_N: torch.Tensor,
    val_MD: torch.Tensor,
    val_labels_M: torch.Tensor,
    *,
    num_classes: int,
    learning_rates: Sequence[float] = LEARNING_RATES,
    epochs: int = 90,
    batch_size: int = 256,
    seed: int = 0,
) -> "LinearProbe":
    """Trains a linear classifier on cached features, at all learning rates at once, and keeps the best.

    As in the paper (appendix A.1), a BatchNorm without affine parameters comes before the classifier and there
    is no weight decay. Two things differ, because the features are fixed: the normalisation takes the statistics
    of the whole training set, not of a batch; and the optimiser is SGD with momentum at small batches, as LARS
    is the paper's means for batches of 16,384. Warm-up and cosine decay go by iteration.

    Args:
        train_ND: Features to train on.
        labels_N: int64 in ``[0, num_classes)``.
        val_MD: Features to choose the learning rate by; a split of the training data, never the test set.
        val_labels_M: Their labels.
        num_classes: C.
        learning_rates: Peak rates; each trains a classifier of its own.
        epochs: Passes over the training features.
        batch_size: Largest batch; an epoch is cut into equal ones.
        seed: Of the order of samples, which is a function of (seed, epoch) alone.

    Raises:
        ValueError: Features are not finite or do not fit together, a label is out of range, or there is nothing
            to train with.
    """
    train_ND, val_MD = _checked(train_ND, "train"), _checked(val_MD, "validation")
    labels_N = _checked_labels(labels_N, train_ND, num_classes)
    val_labels_M = _checked_labels(val_labels_M, val_MD, num_classes)
    if val_MD.shape[1] != train_ND.shape[1]:
        raise ValueError(f"validation features are {val_MD.shape[1]} wide, train features {train_ND.shape[1]}")
    if not learning_rates or epochs < 1 or batch_size < 1:
        raise ValueError("a linear probe needs at least one learning rate, one epoch and a batch of one")
    mean_D, scale_D = _standardisation(train_ND)
    train_ND = (train_ND - mean_D) * scale_D

    num_samples, width = train_ND.shape
    num_rates = len(learning_rates)
    rates_L11 = train_ND.new_tensor(list(learning_rates))[:, None, None]
    # The last column is the bias, and sees a feature that is always 1.
    weights_LCE = train_ND.new_zeros(num_rates, num_classes, width + 1)
    velocity_LCE = torch.zeros_like(weights_LCE)
    train_NE = torch.cat((train_ND, train_ND.new_ones(num_samples, 1)), dim=1)
    targets_NC = torch.nn.functional.one_hot(labels_N, num_classes).to(train_ND.dtype)

    num_batches = -(-num_samples // batch_size)
    for epoch in range(epochs):
        order_N = _epoch_order(num_samples, seed, epoch).to(train_ND.device)
        for batch, order_B in enumerate(order_N.tensor_split(num_batches)):
            features_BE = train_NE[order_B]
            logits_BLC = (features_BE @ weights_LCE.flatten(0, 1).T).unflatten(1, (num_rates, num_classes))
            error_BLC = logits_BLC.softmax(dim=2).sub_(targets_NC[order_B][:, None])
            gradient_LCE = (error_BLC.flatten(1).T @ features_BE).div_(len(order_B)).view_as(weights_LCE)
            velocity_LCE.mul_(_MOMENTUM).add_(gradient_LCE)
            share = _schedule(epoch * num_batches + batch, epochs * num_batches)
            weights_LCE.addcmul_(velocity_LCE, rates_L11, value=-share)

    candidates = [
        LinearProbe(rate, {}, mean_D, scale_D, weights_CE[:, :-1], weights_CE[:, -1])
        for rate, weights_CE in zip(learning_rates, weights_LCE, strict=True)
    ]
    val_top1 = {probe.learning_rate: top1(probe.predict(val_MD), val_labels_M) for probe in candidates}
    best = max(candidates, key=lambda probe: val_top1[probe.learning_rate])
    return LinearProbe(best.learning_rate, val_top1, mean_D, scale_D, best.weight.clone(), best.bias.clone())


def top1(predicted_M: torch.Tensor, labels_M: torch.Tensor) -> float:
    """Share of right predictions, in percent.

    Raises:
        ValueError: There are none, or not as many labels as predictions.
    """
    if predicted_M.shape != labels_M.shape or predicted_M.numel() == 0:
        raise ValueError(f"{predicted_M.numel()} predictions for {labels_M.numel()} labels")
    return 100 * (predicted_M == labels_M.to(predicted_M.device)).double().mean().item()


def split_indices(num: int, share: float, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Splits sample ids into training and validation, each id by its own hash.

    So an id stays on its side when the data grows. Neither side is empty.

    Args:
        num: Ids are ``range(num)``; at least 2.
        share: Expected share of the validation side, between 0 and 1.
        seed: Of the hash.

    Returns:
        Training and validation ids, int64 and ascending.

    Raises:
        ValueError: ``num`` or ``share`` cannot make two sides.
    """
    if num < 2 or not 0 < share < 1:
        raise ValueError(f"{num} samples cannot be split with a share of {share}: need 2 samples and 0 < share < 1")
    drawn_N = uniform(Purpose.SPLIT, seed, np.arange(num))
    is_val_N = drawn_N < share
    is_val_N[drawn_N.argmin()] = True
    is_val_N[drawn_N.argmax()] = False
    return np.flatnonzero(~is_val_N), np.flatnonzero(is_val_N)


def effective_rank(features_ND: torch.Tensor) -> float:
    """How many directions the features really use: 1 where all are parallel, at most ``min(N, D)``.

    The exponential of the entropy of the normalised singular values (Roy and Vetterli, EUSIPCO 2007), a monitor
    of features without labels (RankMe, Garrido et al., ICML 2023). The features are not centred, as there.

    Returns:
        The effective rank; 0 where all features are zero.

    Raises:
        ValueError: Features are not finite.
    """
    features_ND = _checked(features_ND, "given")
    # Through the D x D Gram matrix in float64: far cheaper than singular values of N x D, and as good here.
    gram_DD = features_ND.new_zeros(features_ND.shape[1], features_ND.shape[1], dtype=torch.float64)
    for rows in features_ND.split(_ROWS):
        gram_DD += rows.double().T @ rows.double()
    singular_D = torch.linalg.eigvalsh(gram_DD).clamp_min(0).sqrt()
    if singular_D.sum() == 0:
        return 0.0
    share_D = singular_D / singular_D.sum()
    return torch.special.entr(share_D).sum().exp().item()


def _standardisation(features_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and inverse standard deviation of each feature; 0 for a feature that never varies."""
    total_D = sum(rows.double().sum(dim=0) for rows in features_ND.split(_ROWS))
    mean_D = torch.as_tensor(total_D) / len(features_ND)
    squares_D = sum((rows - mean_D).square().sum(dim=0) for rows in features_ND.split(_ROWS))
    variance_D = torch.as_tensor(squares_D) / len(features_ND)
    varies_D = variance_D > 1e-12 * mean_D.square()
    scale_D = torch.where(varies_D, (variance_D + _EPSILON).rsqrt(), 0)
    return mean_D.to(features_ND.dtype), scale_D.to(features_ND.dtype)


def _epoch_order(num_samples: int, seed: int, epoch: int) -> torch.Tensor:
    hashes_N = hash_u64(Purpose.PROBE, seed, epoch, np.arange(num_samples))
    return torch.from_numpy(hashes_N.argsort(kind="stable"))


def _schedule(step: int, num_steps: int) -> float:
    """Share of the peak rate: a linear warm-up over the first tenth, then half a cosine to zero."""
    num_warmup = int(num_steps * _WARMUP_SHARE)
    if step < num_warmup:
        return (step + 1) / (num_warmup + 1)
    return 0.5 * (1 + np.cos(np.pi * (step - num_warmup) / (num_steps - num_warmup))).item()


def _checked(features: torch.Tensor, name: str) -> torch.Tensor:
    if features.ndim != 2 or 0 in features.shape:
        raise ValueError(f"{name} features have shape {tuple(features.shape)}: expected samples x width, not empty")
    if not features.isfinite().all():
        bad = int((~features.isfinite()).any(dim=1).sum())
        raise ValueError(f"{name} features are not finite in {bad} of {len(features)} samples")
    return features.detach().float()


def _checked_labels(labels: torch.Tensor, features: torch.Tensor, num_classes: int) -> torch.Tensor:
    if labels.shape != features.shape[:1]:
        raise ValueError(f"{tuple(labels.shape)} labels for {len(features)} samples: expected one for each")
    if int(labels.min()) < 0 or int(labels.max()) >= num_classes:
        raise ValueError(f"labels reach from {labels.min()} to {labels.max()}: expected 0 to {num_classes - 1}")
    return labels.to(device=features.device, dtype=torch.int64)


@dataclass(frozen=True)
class LinearProbe:
    """A trained linear classifier with the normalisation before it.

    Attributes:
        learning_rate: The rate that it was trained at, the best on the validation split.
        val_top1: Validation accuracy in percent of each learning rate.
        mean: Mean of the training features, [D].
        scale: Inverse of their standard deviations, [D]; 0 for a feature that never varies.
        weight: [C, D].
        bias: [C].
    """

    learning_rate: float
    val_top1: dict[float, float]
    mean: torch.Tensor
    scale: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor

    def predict(self, features_MD: torch.Tensor) -> torch.Tensor:
        """The most likely class of each sample, int64 [M].

        Raises:
            ValueError: Features are not finite or not of the width that the probe was trained on.
        """
        features_MD = _checked(features_MD, "given")
        if features_MD.shape[1] != len(self.mean):
            raise ValueError(f"features are {features_MD.shape[1]} wide, the probe's {len(self.mean)}")
        predicted = []
        for rows in features_MD.split(_ROWS):
            logits = (rows - self.mean) * self.scale @ self.weight.T + self.bias
            predicted.append(logits.argmax(dim=1))
        return torch.cat(predicted)
