"""Settings: the default data_format of the layers, from Keras' configuration file or set here."""

import json
import os
import warnings
from pathlib import Path

from depthwise_jax._core.layout import DATA_FORMATS, DataFormat

__all__ = ["image_data_format", "set_image_data_format"]

_image_data_format: DataFormat | None = None


def image_data_format() -> DataFormat:
    """The data_format of layers without a data_format argument: "channels_last" or "channels_first".

    Unless `set_image_data_format` was called, this is the `image_data_format` in Keras' configuration file,
    `keras.json` in the folder that the environment variable KERAS_HOME names, else in `~/.keras`. The file is read
    once, when the value is first needed, and never written. Without the file or the entry, the value is
    "channels_last". If the file cannot be read, the value is "channels_last" too, with a warning.

    Raises:
        ValueError: the file holds another value.
    """
    global _image_data_format
    if _image_data_format is None:
        _image_data_format = _from_file()
    return _image_data_format


def set_image_data_format(data_format: DataFormat) -> None:
    """Sets what `image_data_format` returns, for layers constructed from now on.

    Args:
        data_format: "channels_last" or "channels_first", in any case.

    Raises:
        ValueError: any other value.
    """
    global _image_data_format
    if not isinstance(data_format, str) or (name := data_format.lower()) not in DATA_FORMATS:
        raise ValueError(f"data_format must be one of {DATA_FORMATS}; got {data_format!r}")
    _image_data_format = name


def _from_file() -> DataFormat:
    # Unlike Path.expanduser, this accepts a home directory that does not exist.
    path = Path(os.path.expanduser(os.environ.get("KERAS_HOME", "~/.keras")), "keras.json")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(settings, dict):
            raise ValueError(f"expected a JSON object; got {type(settings).__name__}")
    except FileNotFoundError:
        settings = {}
    except (OSError, ValueError, RecursionError) as error:  # ValueError: malformed JSON or UTF-8
        warnings.warn(f"{path} cannot be read, so image_data_format is 'channels_last': {error}", stacklevel=3)
        settings = {}
    value = settings.get("image_data_format", "channels_last")
    if value not in DATA_FORMATS:
        raise ValueError(f"image_data_format in {path} must be one of {DATA_FORMATS}; got {value!r}")
    return value
