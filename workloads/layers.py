"""Depthwise layers of known networks at their real sizes."""

from __future__ import annotations

import re

from workloads.workload import Workload

# Depthwise layers of known networks, channels last, each shape once, for images of 224 x 224 or the named lengths. The
# batch sizes make a call take between about 0.03 and 10 ms on two cores. Strided layers are padded equally on both
# sides, which all peers support without a separate pass.
_NETWORKS_2D = (
    # network, (N, H, W, C), window, stride
    ("mobilenet-v1", (8, 112, 112, 32), 3, 1),
    ("mobilenet-v1", (8, 112, 112, 64), 3, 2),
    ("mobilenet-v1", (8, 56, 56, 128), 3, 1),
    ("mobilenet-v1", (8, 56, 56, 128), 3, 2),
    ("mobilenet-v1", (8, 28, 28, 256), 3, 1),
    ("mobilenet-v1", (8, 14, 14, 512), 3, 1),
    ("mobilenet-v1", (64, 14, 14, 512), 3, 2),
    ("mobilenet-v1", (32, 112, 112, 32), 3, 1),  # 51 MB: fresh pages on every call
    ("mobilenet-v2", (8, 112, 112, 96), 3, 2),
    ("mobilenet-v2", (8, 56, 56, 144), 3, 1),
    ("mobilenet-v2", (24, 56, 56, 144), 3, 1),  # 43 MB: fresh pages too
    ("mobilenet-v2", (8, 28, 28, 192), 3, 1),
    ("mobilenet-v2", (8, 14, 14, 576), 3, 2),
    ("mobilenet-v2", (8, 7, 7, 960), 3, 1),
    ("mobilenet-v3", (8, 112, 112, 16), 3, 1),
    ("mobilenet-v3", (8, 56, 56, 72), 3, 1),
    ("mobilenet-v3", (8, 56, 56, 72), 5, 2),
    ("mobilenet-v3", (8, 28, 28, 88), 3, 1),
    ("mobilenet-v3", (8, 28, 28, 120), 5, 1),
    ("mobilenet-v3", (8, 28, 28, 96), 5, 2),
    ("mobilenet-v3", (16, 14, 14, 184), 3, 1),
    ("mobilenet-v3", (8, 7, 7, 960), 5, 1),
    ("efficientnet-b0", (8, 56, 56, 144), 5, 2),
    ("efficientnet-b0", (8, 28, 28, 240), 5, 1),
    ("efficientnet-b0", (8, 28, 28, 240), 3, 2),
    ("efficientnet-b0", (8, 14, 14, 480), 5, 1),
    ("efficientnet-b0", (8, 14, 14, 672), 5, 2),
    ("efficientnet-b0", (8, 7, 7, 1152), 5, 1),
    ("efficientnet-lite0", (1, 112, 112, 32), 3, 1),
    ("efficientnet-lite0", (1, 28, 28, 240), 5, 1),
    ("efficientnet-lite0", (1, 14, 14, 672), 5, 1),
    ("convnext-t", (8, 56, 56, 96), 7, 1),
    ("convnext-t", (8, 28, 28, 192), 7, 1),
    ("convnext-t", (8, 14, 14, 384), 7, 1),
    ("convnext-t", (8, 7, 7, 768), 7, 1),
    ("replknet-31b", (4, 7, 7, 1024), 13, 1),
    ("replknet-31b", (2, 14, 14, 512), 27, 1),
    ("replknet-31b", (2, 28, 28, 256), 29, 1),
    ("replknet-31b", (1, 56, 56, 128), 31, 1),
)

NETWORKS = (
    # 22 electrodes and 1,125 steps in; then 281 steps and a separable layer's window of 16.
    Workload.of("eegnet-16x22x1125x8-k22x1-m2", (16, 22, 1125, 8), (22, 1, 8, 2)),
    Workload.of("eegnet-64x1x281x16-k1x16", (64, 1, 281, 16), (1, 16, 16, 1), padding="same"),
    Workload.of("mamba-1x2048x1536-k4", (1, 2048, 1536), (4, 1536, 1), padding="causal"),
    Workload.of("conformer-8x400x256-k31", (8, 400, 256), (31, 256, 1), padding="same"),
    *(
        Workload.of(
            f"{network}-{'x'.join(map(str, x))}-k{k}" + ("-s2" if stride == 2 else ""),
            x,
            (k, k, x[-1], 1),
            strides=stride,
            padding=k // 2,
        )
        for network, x, k, stride in _NETWORKS_2D
    ),
)

_TITLES = {
    "eegnet": "EEGNet",
    "mamba": "Mamba",
    "conformer": "Conformer",
    "mobilenet-v1": "MobileNetV1",
    "mobilenet-v2": "MobileNetV2",
    "mobilenet-v3": "MobileNetV3",
    "efficientnet-b0": "EfficientNet-B0",
    "efficientnet-lite0": "EfficientNet-Lite0",
    "convnext-t": "ConvNeXt-T",
    "replknet-31b": "RepLKNet-31B",
}


def title(name: str) -> str:
    """A layer's name for readers, such as "MobileNetV1 8x112x112x64, 3x3, stride 2"."""
    parts = re.fullmatch(r"(.*)-(\d+(?:x\d+)+)-k(\d+(?:x\d+)*)(?:-s(\d+))?(?:-m(\d+))?", name)
    if parts is None:
        raise ValueError(f"name must be a layer's name in NETWORKS; got {name!r}")
    network, shape, window, stride, multiplier = parts.groups()
    if "x" not in window:
        axes = shape.count("x") - 1
        window = "x".join([window] * axes) if axes > 1 else f"window {window}"
    described = [f"{_TITLES[network]} {shape}", window]
    described += [f"stride {stride}"] * bool(stride) + [f"multiplier {multiplier}"] * bool(multiplier)
    return ", ".join(described)
