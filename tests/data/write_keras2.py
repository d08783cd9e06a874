"""Writes keras2.h5, a model in the legacy format by Keras 2, and keras2.npz, what Keras 2 computes with its layers.

Run once, away from the project's own environment, as Keras 2 needs TensorFlow:

    pip install tf-keras tensorflow-cpu
    python tests/data/write_keras2.py
"""

from pathlib import Path

import numpy as np
import tf_keras as keras  # pyright: ignore[reportMissingImports]

HERE = Path(__file__).parent

layers = keras.layers
nested = keras.Sequential(
    [
        keras.Input((6, 5, 2)),
        layers.DepthwiseConv2D((2, 3), depth_multiplier=2, use_bias=False, name="dw"),
        layers.SeparableConv2D(3, 3, padding="same", activation="relu", name="sep"),
    ],
    name="nested",
)
images = keras.Input((6, 5, 2), name="images")
x = layers.DepthwiseConv2D(3, padding="same", activation="relu6", bias_initializer="ones", name="dw")(images)
x = nested(layers.Conv2D(2, 1, name="plain")(x))
series = keras.Input((7, 3), name="series")
y = layers.SeparableConv1D(2, 3, strides=2, name="sep1d")(series)
model = keras.Model([images, series], [x, y], name="whole")
rng = np.random.default_rng(0)
model.set_weights([rng.normal(size=w.shape).astype(np.float32) for w in model.get_weights()])
model.save(HERE / "keras2.h5", include_optimizer=False)

outputs = {}
for name, layer in {
    "dw": model.get_layer("dw"),
    "nested_dw": nested.get_layer("dw"),
    "nested_sep": nested.get_layer("sep"),
    "sep1d": model.get_layer("sep1d"),
}.items():
    sample = rng.normal(size=(1, *layer.input_shape[1:])).astype(np.float32)
    outputs |= {f"{name}_x": sample, f"{name}_y": layer(sample).numpy()}
np.savez_compressed(HERE / "keras2.npz", **outputs)
