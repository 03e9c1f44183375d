"""Ids of the Hugging Face Hub, with and without a revision."""

import pytest

from save_jax import hub_ids


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("openai/clip-vit-base-patch32", ("openai/clip-vit-base-patch32", None)),
        ("a/b.c_d@v1.0", ("a/b.c_d", "v1.0")),
        ("a/b@refs/pr/1", ("a/b", "refs/pr/1")),
        ("a/b@", None),
        ("a/b@-x", None),
        ("a", None),
        ("a@v1", None),
        ("a/b/c", None),
        ("/a/b", None),
        ("../a@v1", None),
        ("gs://bucket/a", None),
    ],
)
def test_what_is_an_id(source, expected):
    assert hub_ids.parse(source) == expected
