"""The default data_format: read once from keras.json, or set."""

import json
from typing import Any

import pytest

from depthwise_jax import settings
from depthwise_jax.linen import DepthwiseConv2D


@pytest.fixture(autouse=True)
def unread(monkeypatch):
    monkeypatch.setattr(settings, "_image_data_format", None)


@pytest.fixture
def keras_json(tmp_path, monkeypatch):
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    return tmp_path / "keras.json"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"image_data_format": "channels_first"}, "channels_first"),
        ({"image_data_format": "channels_last", "floatx": "bfloat16", "epsilon": 1}, "channels_last"),
        ({"image_dim_ordering": "th"}, "channels_last"),
        ({}, "channels_last"),
    ],
)
def test_the_file_is_read(keras_json, content, expected):
    keras_json.write_text(json.dumps(content))
    assert settings.image_data_format() == expected
    assert DepthwiseConv2D(3).data_format == expected


def test_without_a_file_channels_last_and_nothing_is_written(keras_json):
    assert settings.image_data_format() == "channels_last"
    assert list(keras_json.parent.iterdir()) == []


def test_the_file_is_read_once_and_only_when_needed(keras_json):
    keras_json.write_text('{"image_data_format": "nonsense"}')
    assert DepthwiseConv2D(3, data_format="channels_last").data_format == "channels_last"  # never reads it
    keras_json.write_text('{"image_data_format": "channels_first"}')
    assert settings.image_data_format() == "channels_first"
    keras_json.write_text('{"image_data_format": "channels_last"}')
    assert settings.image_data_format() == "channels_first"


@pytest.mark.parametrize(
    "content",
    [
        *(b"{", b"", b"\xff\xfe{}", b"[1]", b'"channels_first"', b"null", b"\x00", b"1" * 5000),
        *(b"[" * 200_000, b'{"a":' * 200_000, b"[" * 200_000 + b"]" * 200_000),
    ],
    ids=lambda content: repr(content[:8]),
)
def test_a_malformed_file_warns_and_counts_as_none(keras_json, content):
    keras_json.write_bytes(content)
    with pytest.warns(UserWarning, match=r"keras\.json cannot be read, so image_data_format is 'channels_last'"):
        assert settings.image_data_format() == "channels_last"
    assert settings.image_data_format() == "channels_last"
    assert keras_json.read_bytes() == content


def test_a_folder_in_its_place_warns(keras_json):
    keras_json.mkdir()
    with pytest.warns(UserWarning, match="cannot be read"):
        assert settings.image_data_format() == "channels_last"


@pytest.mark.parametrize("value", ["NCHW", "CHANNELS_FIRST", None, 3])
def test_an_unknown_value_names_the_file(keras_json, value):
    keras_json.write_text(json.dumps({"image_data_format": value}))
    with pytest.raises(ValueError, match=r"image_data_format in .*keras\.json must be one of"):
        settings.image_data_format()
    with pytest.raises(ValueError, match=r"keras\.json must be one of"):
        DepthwiseConv2D(3)


def test_keras_home_comes_before_the_home_folder(tmp_path, monkeypatch):
    home = tmp_path / "home"
    (home / ".keras").mkdir(parents=True)
    (home / ".keras" / "keras.json").write_text('{"image_data_format": "channels_first"}')
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    assert settings.image_data_format() == "channels_last"
    monkeypatch.setattr(settings, "_image_data_format", None)
    monkeypatch.delenv("KERAS_HOME")
    assert settings.image_data_format() == "channels_first"
    monkeypatch.setattr(settings, "_image_data_format", None)
    monkeypatch.setenv("KERAS_HOME", "~/.keras")
    assert settings.image_data_format() == "channels_first"


def test_set_image_data_format_is_for_layers_made_from_then_on():
    mixed: Any = "Channels_First"
    settings.set_image_data_format(mixed)
    first = DepthwiseConv2D(3)
    settings.set_image_data_format("channels_last")
    assert (first.data_format, first.clone().data_format) == ("channels_first", "channels_first")
    assert DepthwiseConv2D(3).data_format == "channels_last"
    assert DepthwiseConv2D(3, data_format=mixed).data_format == "channels_first"


@pytest.mark.parametrize("value", ["NHWC", None, 3])
def test_setting_nonsense(value):
    with pytest.raises(ValueError, match="data_format must be one of"):
        settings.set_image_data_format(value)


@pytest.mark.parametrize("keras_home", ["~nosuchuser/x", "~nosuchuser", "/nowhere/at/all", ""])
def test_a_home_that_does_not_exist_counts_as_no_file(tmp_path, monkeypatch, keras_home):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KERAS_HOME", keras_home)
    assert settings.image_data_format() == "channels_last"


def test_no_home_at_all(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("KERAS_HOME", raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # what it does without HOME and a passwd entry
    monkeypatch.setattr("pathlib.Path.home", lambda: pytest.fail("raises without a home"))
    assert settings.image_data_format() == "channels_last"
    assert DepthwiseConv2D(3).data_format == "channels_last"
