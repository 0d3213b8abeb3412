"""Environment variables of launchers: invalid values are refused before a library fails on them."""

import pytest

from das_ds.distributed.environment import check_device, check_environment
from das_ds.errors import ConfigError

SOUND = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_PORT": "29500"}


def test_check_environment_of_a_launcher_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SOUND.items():
        monkeypatch.setenv(name, value)
    check_environment()
    check_device(1, 2)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("WORLD_SIZE", "abc", "WORLD_SIZE: found 'abc' in the environment, expected an integer from 1"),
        ("WORLD_SIZE", "", "WORLD_SIZE: found '' in the environment"),
        ("WORLD_SIZE", "0", "WORLD_SIZE: found '0' in the environment, expected an integer from 1"),
        ("RANK", "-1", "RANK: found '-1' in the environment, expected an integer from 0"),
        ("RANK", "2", "RANK: found 2, allowed: 0 to 1 with WORLD_SIZE 2"),
        ("LOCAL_RANK", "1_0", "LOCAL_RANK: found '1_0' in the environment"),
        ("MASTER_PORT", "http", "MASTER_PORT: found 'http' in the environment"),
        ("MASTER_PORT", "99999", "MASTER_PORT: found 99999, allowed: 0 to 65535"),
    ],
)
def test_check_environment_invalid_value_raises(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, expected: str
) -> None:
    for known, sound in SOUND.items():
        monkeypatch.setenv(known, sound)
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as caught:
        check_environment()
    assert str(caught.value).startswith(expected)


def test_check_device_missing_gpu_raises() -> None:
    with pytest.raises(ConfigError, match="LOCAL_RANK: found 4, allowed: 0 to 3, one rank for each of the GPUs"):
        check_device(4, 4)
