"""Linear support vector machines on descriptors, as the linear layers that they are: scikit-learn finds the weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vidbench.sweep import RequestError


def fit_svm(layer: nn.Linear, descriptors: Tensor, labels: Tensor, *, c: float = 1.0) -> None:
    """Makes a linear layer a multi-class linear SVM, one class against the rest; its outputs are the margins.

    Args:
        layer: Features → classes; its weights are overwritten.
        descriptors: (N, in_features).
        labels: (N,), from 0 to out_features - 1, each at least once.
        c: Weight of the margin violations.

    Raises:
        RequestError: scikit-learn is not there, shapes do not fit, or a class has no example.

    Source: Cortes & Vapnik (1995), "Support-vector networks"; for C3D arXiv:1412.0767, §4, and for two streams
    arXiv:1406.2199, §5.
    """
    try:
        from sklearn.svm import LinearSVC
    except ImportError as error:
        raise RequestError("a linear SVM needs scikit-learn: pip install 'vidbench[svm]'") from error

    classes = layer.out_features
    if descriptors.dim() != 2 or descriptors.shape[1] != layer.in_features or labels.shape != descriptors.shape[:1]:
        raise RequestError(
            f"descriptors {tuple(descriptors.shape)} and labels {tuple(labels.shape)} are not "
            f"(N, {layer.in_features}) and (N,)"
        )
    given = set(labels.tolist())
    if given != set(range(classes)):
        wrong = sorted(given.symmetric_difference(range(classes)))
        raise RequestError(f"an SVM of {classes} classes needs every label from 0 to {classes - 1}: see {wrong[:8]}")
    machine = LinearSVC(C=c, random_state=0).fit(descriptors.double().cpu().numpy(), labels.cpu().numpy())
    weight, bias = torch.from_numpy(machine.coef_), torch.from_numpy(machine.intercept_)
    if classes == 2:  # One machine tells two classes apart.
        weight, bias = torch.cat((-weight, weight)), torch.cat((-bias, bias))
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
