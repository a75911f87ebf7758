"""A stop string is never shown, however the text is cut into pieces."""

from hypothesis import given
from hypothesis import strategies as st

from cllm_spheres.inference.stops import Stops

letters = st.text("ab", max_size=12)


@given(st.lists(letters, max_size=12), st.text("ab", min_size=1, max_size=4))
def test_what_is_shown_ends_before_the_first_stop(pieces, stop):
    whole, stops = "".join(pieces), Stops([stop])
    shown = "".join(stops.feed(piece) for piece in pieces)
    assert stops.found == (stop in whole)
    assert shown + stops.finish() == whole.split(stop)[0]


@given(st.lists(letters, max_size=12), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_of_several_stops_none_is_shown(pieces, texts):
    whole, stops = "".join(pieces), Stops(texts)
    shown = "".join(stops.feed(piece) for piece in pieces) + stops.finish()
    assert whole.startswith(shown) and not any(text in shown for text in texts)
    assert stops.found == any(text in whole for text in texts) and (stops.found or shown == whole)


@given(st.lists(letters, max_size=12))
def test_without_stops_nothing_is_held_back(pieces):
    stops = Stops([])
    assert [stops.feed(piece) for piece in pieces] == pieces and stops.finish() == ""
