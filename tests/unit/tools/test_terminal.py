"""Text for a terminal."""

from a2tgpo.io.terminal import indented


def test_text_of_any_script_is_shown_as_it_was_written():
    for text in ("日本の\u3000首都", "می\u200cخواهم", "ශ්\u200dරී", "👩\u200d🔬", "10\u00a0km", "กรุงเทพ"):
        assert indented(text) == f"    {text}"


def test_what_could_change_the_terminals_state_is_made_visible():
    assert indented("a\x1b[31mb\x07\u202ec") == "    a\ufffd[31mb\ufffd\ufffdc"
