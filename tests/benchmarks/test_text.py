"""The texts of an installation: messages of its programs in other languages."""

import struct

from benchmarks.text import translated_messages

LONG = "Die Datei {} konnte nicht gelesen werden, weil sie einem anderen Benutzer gehört."


def catalogue(messages: dict[str, str], charset: str = "UTF-8") -> bytes:
    """Return a catalogue of GNU gettext: header, places of originals and of translations, and the strings."""
    entries = {"": f"Content-Type: text/plain; charset={charset}\n", **messages}
    originals = [name.encode() for name in sorted(entries)]
    translations = [entries[name].encode(charset) for name in sorted(entries)]
    strings, places, start = b"", b"", 28 + 16 * len(entries)
    for each in originals + translations:
        places += struct.pack("<II", len(each), start + len(strings))
        strings += each + b"\0"
    header = (0x950412DE, 0, len(entries), 28, 28 + 8 * len(entries), 0, 28)
    return struct.pack("<7I", *header) + places + strings


def test_translated_messages_are_sentences_of_another_language(tmp_path):
    place = tmp_path / "de" / "LC_MESSAGES"
    place.mkdir(parents=True)
    sentences = [LONG.format(name) for name in ("eins", "zwei", "drei")]
    messages = {"one": sentences[0], "short": "kurz", "%s": LONG.format("%s")}
    plural = {"%d\0%d files": f"{sentences[2]}\0{LONG}"}
    (place / "a.mo").write_bytes(catalogue(messages | plural))
    same = LONG.format("vier")
    (place / "b.mo").write_bytes(catalogue({"two": sentences[1], "one again": sentences[0], same: same}))
    (place / "c.mo").write_bytes(catalogue({"ü": sentences[2]}, "latin-1")[:-5])
    (place / "d.mo").write_bytes(b"no catalogue")
    (place / "e.mo").write_bytes(b"")
    found = translated_messages("de", tmp_path)
    assert sorted(found) == sorted(sentences[:2]), "no short ones, no plurals, none twice, no original"
    assert translated_messages("fr", tmp_path) == []
