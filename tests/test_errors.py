"""Errors about a part of a request name the part, in the text too."""

from __future__ import annotations

from deltaserve.errors import CompositionRefused, Reason, inside


def test_the_text_names_the_part_and_leaves_what_the_client_wrote() -> None:
    reason = Reason("mixed_sides", "adapters[0]", "outputs that adapters[1] changes", "one side")
    text = "adapters[0] has outputs that adapters[1] changes; 'adapters[7]' and other.adapters[2] stay, so do adapters"
    error = CompositionRefused(text, param="adapters", reasons=[reason])
    inside(error, "ensemble.members[2]")
    expected = (
        "ensemble.members[2].adapters[0] has outputs that ensemble.members[2].adapters[1] changes; "
        "'adapters[7]' and other.adapters[2] stay, so do adapters"
    )
    assert error.body()["message"] == str(error) == expected
    assert error.reasons == (
        Reason(
            "mixed_sides",
            "ensemble.members[2].adapters[0]",
            "outputs that ensemble.members[2].adapters[1] changes",
            "one side",
        ),
    )
