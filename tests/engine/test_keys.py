"""From keys to names: always a plain file name, never another's."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.engine.keys import name_of_bounded, name_of_content, name_of_key, name_to_fetch

HASH = "0123456789abcdef" * 4
KEYS = st.one_of(st.text(), st.text("./-_a", max_size=6), st.from_regex(r"(key|bounded|content)-[0-9a-f]{64}"))
# What the text of a message can be.
WIRE_KEYS = st.text(st.characters(exclude_categories=["Cs"]))


@given(KEYS)
def test_a_name_is_a_plain_file_name_whatever_the_key(key: str) -> None:
    for name in (name_of_key(key), name_of_bounded(key, 1, 2), name_of_content(key.encode("utf-8", "surrogatepass"))):
        assert re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}", name)


@pytest.mark.parametrize(
    "key", ["a", "img-0017.png", "A" * 128, "0" * 64, "550e8400-e29b-41d4-a716-446655440000", "key-1"]
)
def test_a_plain_key_is_its_own_name(key: str) -> None:
    assert name_of_key(key) == key


@pytest.mark.parametrize(
    "key",
    [
        *(
            "",
            ".",
            "..",
            ".lock",
            ".draft-0",
            "a/b",
            "../x",
            "/etc/passwd",
            "a b",
            "a\n",
            "a\0",
            "ä",
            "A" * 129,
            "\ud800",
        ),
        *(f"key-{HASH}", f"bounded-{HASH}", f"content-{HASH}"),
    ],
)
def test_any_other_key_is_hashed(key: str) -> None:
    assert re.fullmatch("key-[0-9a-f]{64}", name_of_key(key))
    assert name_of_key(key) != key


@given(st.lists(KEYS, unique=True, min_size=2, max_size=20))
def test_different_keys_have_different_names(keys: list[str]) -> None:
    assert len({name_of_key(key) for key in keys}) == len(keys)


@given(KEYS, KEYS, st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1))
def test_no_key_stands_for_what_has_bounds_or_no_key(key: str, other: str, least: int, most: int) -> None:
    made = {name_of_bounded(other, least, most), name_of_content(b"content"), name_of_key(other + "/")}
    assert name_of_key(key) not in made or key == other + "/"
    for name in made:
        assert name_of_key(name) not in made


def test_bounds_make_another_name_each() -> None:
    names = {
        name_of_bounded("a", 1, 2),
        name_of_bounded("a", 2, 1),
        name_of_bounded("a", 1, 0),
        name_of_bounded("a, 1", 1, 2),
    }
    assert len({*names, name_of_bounded("a", 12, 0)}) == 5


@given(WIRE_KEYS)
def test_what_was_stored_under_a_key_is_fetched_by_it_and_by_its_name(key: str) -> None:
    name = name_of_key(key)
    assert name_to_fetch(name) == name
    if not re.fullmatch("(key|bounded|content)-[0-9a-f]{64}", key):
        assert name_to_fetch(key) == name
    for made in (name_of_bounded(key, 1, 2), name_of_content(key.encode())):
        assert name_to_fetch(made) == made
