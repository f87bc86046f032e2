"""Writes the corpus of malformed checkpoints into its own folder, and `expected.json` beside them.

Every input is small and written from text in this file, so that a reader sees the fault. `expected.json` gives for each
input the substrings that an error message must contain: the file's name, the tensor's name where one is concerned, and
a word for what is wrong.

    python make_malformed.py            # writes the files
    python make_malformed.py --check    # exits 1 if the stored files differ from what this script makes
"""

import json
import shutil
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
MAX_BYTES = 1000

# The tensor that most inputs damage: F32 [2, 3], 24 bytes.
DATA = bytes(range(24))
GOOD = '"dtype":"F32","shape":[2,3],"data_offsets":[0,24]'

# path -> bytes of every file to be stored; input -> substrings of its error message.
stored: dict[str, bytes] = {}
expected: dict[str, list[str]] = {}


def safetensors(header: str | bytes, data: bytes = DATA, length: int | None = None) -> bytes:
    """A file with this header text and data; `length` overrides what the length field says."""
    text = header.encode() if isinstance(header, str) else header
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def raw(name: str, content: bytes, *words: str) -> None:
    """One malformed file."""
    path = f"{name}.safetensors"
    assert path not in stored, path
    stored[path] = content
    expected[path] = [path, *words]


def header(name: str, text: str | bytes, *words: str, data: bytes = DATA, length: int | None = None) -> None:
    """One file with a malformed header."""
    raw(name, safetensors(text, data, length), *words)


def entry(name: str, fields: str, *words: str, data: bytes = DATA, tensor: str = "layer.weight") -> None:
    """One file with one tensor, whose entry is malformed: the message has to name it."""
    header(name, f'{{"{tensor}":{fields}}}', tensor, *words, data=data)


def tensor(name: str, dtype: str, shape: str, offsets: str, *words: str, data: bytes = DATA) -> None:
    """One file with one tensor, of whose three fields one is malformed."""
    entry(name, f'{{"dtype":{dtype},"shape":{shape},"data_offsets":{offsets}}}', *words, data=data)


def folder(name: str, files: dict[str, bytes], *words: str) -> None:
    """One malformed directory."""
    for path, content in files.items():
        stored[f"{name}/{path}"] = content
    expected[name] = list(words)


def lengths() -> None:
    """The eight bytes before the header."""
    raw("empty_file", b"", "0 bytes", "at least 8")
    raw("seven_bytes", b"\x02\0\0\0\0\0\0", "7 bytes", "at least 8")
    header("header_longer_than_file", f'{{"a":{{{GOOD}}}}}', "header of 1000 bytes", length=1000)
    header("header_one_byte_too_long", "{}", "header of 3 bytes", "2 bytes", data=b"", length=3)
    raw("header_of_2_to_63_bytes", safetensors("{}", b"", 2**63), str(2**63))
    raw("header_of_2_to_64_minus_4_bytes", safetensors("{}", b"", 2**64 - 4), str(2**64 - 4))
    raw("header_of_2_to_64_minus_1_bytes", safetensors("{}", b"", 2**64 - 1), str(2**64 - 1))
    raw("header_over_100_mb", safetensors("", b"", 100_000_001), "100000001", "100000000")
    raw("header_of_100_mb_missing", safetensors("", b"", 100_000_000), "100000000", "0 bytes")
    raw("header_length_big_endian", (2).to_bytes(8, "big") + b"{}", "header of")
    header("header_cut_by_its_length", f'{{"a":{{{GOOD}}}}}', "EOF", length=20)
    raw("header_of_zero_bytes", safetensors("", b""), "empty header")
    raw("header_of_zero_bytes_with_data", safetensors(""), "empty header")


def texts() -> None:
    """Headers that are no JSON object, or more than one."""
    header("begins_with_space", f' {{"a":{{{GOOD}}}}}', "begins with", "0x20")
    header("begins_with_byte_order_mark", b"\xef\xbb\xbf{}", "begins with", "0xef", data=b"")
    header("list", f'[{{"a":{{{GOOD}}}}}]', "begins with", "'{'")
    header("string", '"header"', "begins with", data=b"")
    header("number", "12", "begins with", data=b"")
    header("null", "null", "begins with", data=b"")
    header("name_not_utf8", b'{"\xff\xfe":{' + GOOD.encode() + b"}}", "unicode")
    header("name_overlong_utf8", b'{"\xc0\xaf":{' + GOOD.encode() + b"}}", "unicode")
    header("name_with_lone_surrogate", f'{{"\\ud800":{{{GOOD}}}}}', "surrogate")
    header("name_with_swapped_surrogates", f'{{"\\udc00\\ud800":{{{GOOD}}}}}', "surrogate")
    header("name_with_bad_escape", f'{{"\\x61":{{{GOOD}}}}}', "escape")
    header("name_with_raw_control_character", b'{"a\0b":{' + GOOD.encode() + b"}}", "control character")
    header("name_without_quotes", f"{{a:{{{GOOD}}}}}", "key must be a string")
    header("name_is_a_number", f"{{1:{{{GOOD}}}}}", "key must be a string")
    header("truncated_in_name", '{"lay', "EOF", data=b"")
    header("truncated_before_brace", f'{{"a":{{{GOOD}}}', "EOF")
    header("single_brace", "{", "EOF", data=b"")
    header("trailing_comma", f'{{"a":{{{GOOD}}},}}', "trailing comma")
    header("comment", f'{{/* */"a":{{{GOOD}}}}}', "key must be a string")
    header("trailing_text", f'{{"a":{{{GOOD}}}}}x', "trailing characters")
    header("two_objects", f'{{"a":{{{GOOD}}}}}{{}}', "trailing characters")
    header("padded_with_nul", f'{{"a":{{{GOOD}}}}}'.encode() + bytes(8), "trailing characters")
    header("deep_objects", '{"a":' * 150 + "1" + "}" * 150, '"a"', "unknown field", data=b"")
    header("deep_arrays", '{"a":' + "[" * 400 + "]" * 400 + "}", '"a"', "sequence", data=b"")
    header("deep_arrays_open", '{"a":{"shape":[' + "[" * 900, '"a"', "sequence", data=b"")
    header("deep_metadata", '{"__metadata__":' + '{"a":' * 150 + "1" + "}" * 151, "__metadata__", "map", data=b"")


def entries() -> None:
    """Entries that are not objects of exactly three fields."""
    entry("entry_is_array", '["F32",[2,3],[0,24]]', "sequence")
    entry("entry_is_string", '"F32"', "string")
    entry("entry_is_number", "24", "integer")
    entry("entry_is_null", "null", "null")
    entry("entry_is_true", "true", "boolean")
    entry("entry_is_empty", "{}", "missing field")
    entry("missing_dtype", '{"shape":[2,3],"data_offsets":[0,24]}', "missing field", "dtype")
    entry("missing_shape", '{"dtype":"F32","data_offsets":[0,24]}', "missing field", "shape")
    entry("missing_data_offsets", '{"dtype":"F32","shape":[2,3]}', "missing field", "data_offsets")
    entry("extra_field", f'{{{GOOD},"strides":[3,1]}}', "unknown field", "strides")
    entry("field_in_capitals", f'{{"Dtype":"F32",{GOOD}}}', "unknown field", "Dtype")
    entry("dtype_twice", f'{{{GOOD},"dtype":"F32"}}', "dtype twice")
    entry("dtype_twice_and_different", f'{{{GOOD},"dtype":"I32"}}', "dtype twice")
    entry("shape_twice", f'{{"shape":[6],{GOOD}}}', "shape twice")
    entry("data_offsets_twice", f'{{{GOOD},"data_offsets":[0,24]}}', "data_offsets twice")
    entry("shape_twice_by_escape", f'{{{GOOD},"sh\\u0061pe":[6]}}', "shape twice")


def duplicates() -> None:
    """Names that come twice: parsers that keep the first or the last would read different tensors."""
    first, second = (
        '{"dtype":"F32","shape":[3],"data_offsets":[0,12]}',
        '{"dtype":"F32","shape":[3],"data_offsets":[12,24]}',
    )
    header("name_twice", f'{{"a.b":{first},"a.b":{second}}}', '"a.b"', "twice")
    header("name_twice_backwards", f'{{"a.b":{second},"a.b":{first}}}', '"a.b"', "twice")
    header("name_twice_same_range", f'{{"a.b":{{{GOOD}}},"a.b":{{{GOOD}}}}}', '"a.b"', "twice")
    header("name_twice_apart", f'{{"a.b":{first},"c":{second},"a.b":{first}}}', '"a.b"', "twice")
    header("name_twice_escaped_second", f'{{"a.b":{first},"\\u0061.b":{second}}}', '"a.b"', "twice")
    header("name_twice_escaped_first", f'{{"\\u0061.b":{first},"a.b":{second}}}', '"a.b"', "twice")
    header("name_twice_escaped_same_range", f'{{"a\\u002eb":{{{GOOD}}},"a.b":{{{GOOD}}}}}', '"a.b"', "twice")
    nothing = '{"dtype":"F32","shape":[0],"data_offsets":[24,24]}'
    header("name_twice_once_empty", f'{{"a.b":{{{GOOD}}},"a.b":{nothing}}}', '"a.b"', "twice")
    header("empty_name_twice", f'{{"":{first},"":{second}}}', '""', "twice")


def metadata() -> None:
    """`__metadata__` maps strings to strings."""

    def case(name: str, value: str, *words: str) -> None:
        header(f"metadata_{name}", f'{{"__metadata__":{value},"a":{{{GOOD}}}}}', "__metadata__", *words)

    case("is_list", '["format","pt"]', "sequence")
    case("is_string", '"pt"', "string")
    case("is_number", "1", "integer")
    case("is_tensor", f"{{{GOOD}}}", "sequence")
    case("value_is_number", '{"format":1}', "integer")
    case("value_is_null", '{"format":null}', "null")
    case("value_is_object", '{"format":{"a":"b"}}', "map")
    case("value_is_list", '{"format":["pt"]}', "sequence")
    case("key_twice", '{"format":"pt","format":"np"}', "format", "twice")
    case("key_twice_escaped", '{"format":"pt","form\\u0061t":"pt"}', "format", "twice")
    header("metadata_twice", f'{{"__metadata__":{{}},"a":{{{GOOD}}},"__metadata__":{{}}}}', "__metadata__", "twice")
    header(
        "metadata_twice_by_escape",
        f'{{"__metadata__":{{"a":"b"}},"\\u005f_metadata__":{{}},"a":{{{GOOD}}}}}',
        "__metadata__",
        "twice",
    )


def dtypes() -> None:
    """Dtypes outside the table."""
    for name, dtype, *words in [
        ("unknown", '"F128"', "F128"),
        ("lower_case", '"f32"', "f32"),
        ("numpy_name", '"float32"', "float32"),
        ("empty", '""', '""'),
        ("with_space", '"F32 "', "F32 "),
        ("with_nul", '"F32\\u0000"', "\\0"),
        ("number", "7", "integer"),
        ("null", "null", "null"),
        ("map", '{"F32":null}', "map"),
        ("list", '["F32"]', "sequence"),
    ]:
        tensor(f"dtype_{name}", dtype, "[2,3]", "[0,24]", "dtype", *words)


def shapes() -> None:
    """Shapes that are no lists of dimensions, or that no array can have."""
    for name, shape, *words in [
        ("negative", "[2,-3]", "-3"),
        ("minus_zero", "[-0]", "-0"),
        ("float", "[2.5,3]", "2.5"),
        ("whole_float", "[2.0,3]", "2.0"),
        ("exponent", "[6e0]", "6.0"),
        ("not_a_number", "[NaN]", "expected value"),
        ("infinite", "[1e400]", "out of range"),
        ("leading_zero", "[02,3]", "number"),
        ("of_400_digits", f"[{'9' * 400}]", "out of range"),
        ("of_2_to_64", f"[{2**64}]", "u64"),
        ("string", '["2",3]', "string"),
        ("null", "null", "null"),
        ("null_inside", "[2,null]", "null"),
        ("bool", "[true,3]", "boolean"),
        ("number", "6", "integer"),
        ("object", '{"0":2,"1":3}', "map"),
        ("nested", "[[2,3]]", "sequence"),
    ]:
        tensor(f"shape_{name}", '"F32"', shape, "[0,24]", *words)
    for name, dtype, shape in [
        ("product_overflows", "F32", [2**40, 2**41]),
        # Modulo 2^64 this one has 24 bytes.
        ("product_wraps_to_its_size", "F32", [2**63 + 3, 2]),
        ("of_2_to_63", "U8", [2**63]),
        ("of_2_to_64_minus_1", "U8", [2**64 - 1]),
        ("of_2_to_61_elements", "F32", [2**61]),
        ("zero_times_huge", "F32", [2**40, 0, 2**41]),
        ("zero_times_2_to_63", "U8", [0, 2**63]),
    ]:
        tensor(f"shape_{name}", f'"{dtype}"', json.dumps(shape), "[0,24]", "shape", "2^63")
    tensor("shape_of_rank_65", '"F32"', json.dumps([1] * 64 + [6]), "[0,24]", "64")
    tensor("shape_of_rank_65_empty", '"F32"', json.dumps([0] * 65), "[0,0]", "64", data=b"")
    tensor("f4_of_half_a_byte", '"F4"', "[3,1]", "[0,2]", "whole number of bytes", data=b"ab")
    tensor("f6_e2m3_of_three_quarters", '"F6_E2M3"', "[5]", "[0,4]", "whole number of bytes", data=b"abcd")
    tensor("f6_e3m2_of_half_a_byte", '"F6_E3M2"', "[2,3]", "[0,5]", "whole number of bytes", data=b"abcde")


def offsets() -> None:
    """Offsets that are no pair, or that disagree with the shape or the file."""
    for name, pair, *words in [
        ("negative", "[-24,0]", "-24"),
        ("float", "[0,24.0]", "24.0"),
        ("infinite", "[0,1e400]", "out of range"),
        ("of_one_element", "[24]", "length 1"),
        ("of_three_elements", "[0,12,24]", "trailing characters"),
        ("empty", "[]", "length 0"),
        ("null", "null", "null"),
        ("null_inside", "[0,null]", "null"),
        ("string", '["0","24"]', "string"),
        ("object", '{"begin":0,"end":24}', "map"),
        ("nested", "[[0,24]]", "sequence"),
        ("number", "24", "integer"),
        ("of_2_to_64", f"[0,{2**64}]", "u64"),
        ("reversed", "[24,0]", "[24, 0]", "begin <= end"),
        ("beyond_the_data", "[0,28]", "[0, 28]", "24"),
        ("all_beyond_the_data", "[24,48]", "[24, 48]", "24"),
        # end - begin is the right size, begin + 8 + header overflows.
        ("near_2_to_64", f"[{2**64 - 25},{2**64 - 1}]", str(2**64 - 1), "24"),
        ("too_many_for_the_shape", "[0,24]", "24 bytes", "20 bytes"),
    ]:
        shape = "[1,5]" if name == "too_many_for_the_shape" else "[2,3]"
        tensor(f"offsets_{name}", '"F32"', shape, pair, *words)
    tensor("offsets_too_few_for_the_shape", '"F32"', "[7]", "[0,24]", "24 bytes", "28 bytes")
    tensor("offsets_too_few_for_a_scalar", '"F64"', "[]", "[0,4]", "4 bytes", "8 bytes", data=b"abcd")
    tensor("offsets_for_an_empty_tensor", '"F32"', "[3,0]", "[0,24]", "24 bytes", "0 bytes")
    tensor("offsets_empty_for_a_scalar", '"U8"', "[]", "[0,0]", "0 bytes", "1 bytes", data=b"")


def layouts() -> None:
    """Tensors that do not tile the data."""

    def case(name: str, first: tuple[int, int], second: tuple[int, int], *words: str, nbytes: int = 24) -> None:
        entries = ",".join(
            f'"{key}":{{"dtype":"U8","shape":[{end - begin}],"data_offsets":[{begin},{end}]}}'
            for key, (begin, end) in {"a": first, "b.bias": second}.items()
        )
        header(f"layout_{name}", f"{{{entries}}}", *words, data=DATA[:nbytes])

    case("overlap", (0, 13), (12, 24), '"b.bias"', "overlap")
    case("overlap_backwards", (12, 24), (0, 13), '"a"', "overlap")
    case("same_range", (0, 24), (0, 24), '"b.bias"', "overlap")
    case("one_inside_the_other", (0, 24), (6, 9), '"b.bias"', "overlap")
    case("empty_inside_another", (0, 24), (7, 7), '"b.bias"', "overlap")
    case("hole", (0, 11), (12, 24), '"b.bias"', "hole")
    case("hole_before_empty", (0, 20), (24, 24), '"b.bias"', "hole")
    case("begins_late", (12, 24), (4, 12), '"b.bias"', "hole")
    case("trailing_bytes", (0, 7), (7, 20), "24 bytes", "20 bytes")
    case("missing_bytes", (0, 7), (7, 24), '"b.bias"', "[7, 24]", "20", nbytes=20)
    case("all_bytes_missing", (0, 7), (7, 24), '"a"', "[0, 7]", nbytes=0)
    header("data_without_tensors", "{}", "24 bytes", "0 bytes")
    header("data_with_metadata_only", '{"__metadata__":{"format":"pt"}}', "24 bytes", "0 bytes")


def shard(*names: str) -> bytes:
    """A well-formed file of U8 [2] tensors."""
    fields = [
        f'"{name}":{{"dtype":"U8","shape":[2],"data_offsets":[{2 * i},{2 * i + 2}]}}' for i, name in enumerate(names)
    ]
    return safetensors(f"{{{','.join(fields)}}}", DATA[: 2 * len(names)])


def index(weight_map: object) -> bytes:
    """The text of an index."""
    return json.dumps({"metadata": {"total_size": 4}, "weight_map": weight_map}).encode() + b"\n"


def folders() -> None:
    """Directories: their indexes, and what the indexes name."""
    name = "model.safetensors.index.json"
    whole = {"a.safetensors": shard("x.w"), "b.safetensors": shard("y.w")}
    for case, target in {
        "parent": "../empty_file.safetensors",
        "parent_alone": "..",
        "deep_parent": "b/../../a.safetensors",
        "subfolder": "sub/a.safetensors",
        "here": "./a.safetensors",
        "here_alone": ".",
        "absolute": "/etc/hostname",
        "backslash": "..\\a.safetensors",
        "drive": "C:a.safetensors",
        "nul": "a.safetensors\0",
        "empty": "",
    }.items():
        # As a Rust or JSON string literal shows it, without the quotes.
        shown = json.dumps(target)[1:-1].replace("\\u0000", "\\0")
        folder(f"index_entry_{case}", {name: index({"x.w": target}), **whole}, name, '"x.w"', shown, "bare name")
    good = {"x.w": "a.safetensors", "y.w": "b.safetensors"}
    for case, content, *words in [
        ("entry_is_number", index({"x.w": 1}), "integer"),
        ("entry_is_list", index({"x.w": ["a.safetensors"]}), "sequence"),
        ("entry_is_null", index({"x.w": None}), "null"),
        ("entry_twice", b'{"weight_map":{"x.w":"a.safetensors","x.w":"b.safetensors"}}', "x.w", "twice"),
        ("entry_twice_escaped", b'{"weight_map":{"x.w":"a.safetensors","\\u0078.w":"b.safetensors"}}', "x.w", "twice"),
        ("weight_map_twice", b'{"weight_map":{"x.w":"a.safetensors"},"weight_map":{}}', "duplicate field"),
        ("weight_map_is_list", index(["a.safetensors", "b.safetensors"]), "sequence"),
        ("weight_map_is_string", index("a.safetensors"), "string"),
        ("weight_map_is_null", index(None), "null"),
        ("weight_map_missing", b'{"metadata":{"total_size":4}}', "missing field"),
        ("weight_map_empty", index({}), "empty weight_map"),
        ("is_list", index(good).replace(b'{"metadata"', b'[{"metadata"').strip() + b"]", "weight_map"),
        ("is_list_of_map", json.dumps([good]).encode(), "sequence"),
        ("is_text", b"x.w = a.safetensors\n", "expected value"),
        ("is_empty", b"", "EOF"),
        ("is_truncated", index(good)[:-4], "EOF"),
        ("has_trailing_text", index(good) + b"{}", "trailing characters"),
        ("not_utf8", b'{"weight_map":{"x.w":"\xff"}}', "unicode"),
        ("entry_too_deep", b'{"weight_map":{"x.w":' + b"[" * 400 + b"]" * 400 + b"}}", "sequence"),
    ]:
        folder(f"index_{case}", {name: content, **whole}, name, *words)
    missing_file = {"x.w": "a.safetensors", "y.w": "gone.safetensors"}
    folder("index_file_missing", {name: index(missing_file), **whole}, name, "gone.safetensors")
    missing_tensor = {**good, "z.w": "b.safetensors"}
    folder("index_tensor_missing", {name: index(missing_tensor), **whole}, name, '"z.w"', "b.safetensors", "no such")
    swapped = {"x.w": "a.safetensors", "y.w": "a.safetensors"}
    folder("index_tensor_in_file_not_named", {name: index(swapped), **whole}, name, '"y.w"', "a.safetensors")
    exchanged = {"x.w": "b.safetensors", "y.w": "a.safetensors"}
    folder("index_files_exchanged", {name: index(exchanged), **whole}, name, '"x.w"', "a.safetensors", "b.safetensors")
    twice = {"a.safetensors": shard("x.w"), "b.safetensors": shard("y.w", "x.w")}
    folder("index_tensor_in_two_files", {name: index(good), **twice}, "b.safetensors", '"x.w"', "a.safetensors")
    folder("tensor_in_two_files", twice, "b.safetensors", '"x.w"', "a.safetensors", "each tensor in one file")
    two = {"a.safetensors.index.json": index(good), "b.safetensors.index.json": index(good), **whole}
    folder("index_twice", two, "index_twice", "a.safetensors.index.json", "b.safetensors.index.json", "one index")
    note = b"Keeps the folder in the repository.\n"
    folder("index_is_a_folder", {f"{name}/note.txt": note, **whole}, name, "a directory", "regular file")
    folder("index_names_a_folder", {name: index({"x.w": "a"}), "a/note.txt": note}, "a directory", "regular file")
    folder("no_checkpoint", {"note.txt": note}, "no_checkpoint", "without", "safetensors")
    folder("no_checkpoint_but_in_a_subfolder", {"sub/a.safetensors": shard("x.w")}, "subfolder", "without")
    folder("file_is_a_folder", {"a.safetensors/note.txt": note}, "a.safetensors", "a directory", "regular file")
    folder("one_file_of_two_malformed", {**whole, "b.safetensors": shard("y.w")[:-1]}, "b.safetensors", '"y.w"')
    folder("manifest_is_empty_object", {"manifest.json": b"{}\n"}, "manifest.json", "missing field")
    folder("manifest_of_another_version", {"manifest.json": VERSION_2}, "manifest.json", "format_version 2")


VERSION_2 = b'{"format":"numpy-direct","format_version":2,"tensorport_version":"9"}\n'


def collect() -> None:
    """Fills `stored`, and adds `expected.json` to it."""
    for area in [lengths, texts, entries, duplicates, metadata, dtypes, shapes, offsets, layouts, folders]:
        area()
    too_large = [path for path, content in stored.items() if len(content) > MAX_BYTES]
    assert not too_large, too_large
    rows = (f"  {json.dumps(name)}: {json.dumps(words)}" for name, words in sorted(expected.items()))
    stored["expected.json"] = ("{\n" + ",\n".join(rows) + "\n}\n").encode()


def on_disk() -> dict[str, bytes]:
    """The corpus as it is stored now."""
    own = {Path(__file__).name, "__pycache__"}
    paths = (path for path in HERE.rglob("*") if path.is_file() and path.relative_to(HERE).parts[0] not in own)
    return {path.relative_to(HERE).as_posix(): path.read_bytes() for path in paths}


def main() -> int:
    """Writes the corpus, or with `--check` compares it."""
    collect()
    found = on_disk()
    if sys.argv[1:] == ["--check"]:
        differences = sorted(path for path in stored.keys() | found.keys() if stored.get(path) != found.get(path))
        for path in differences:
            print(f"{path}: differs from what {Path(__file__).name} makes", file=sys.stderr)
        return 1 if differences else 0
    if sys.argv[1:]:
        print("usage: make_malformed.py [--check]", file=sys.stderr)
        return 2
    for path in found.keys() - stored.keys():
        (HERE / path).unlink()
    for path, content in stored.items():
        target = HERE / path
        if target.is_dir():
            shutil.rmtree(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
    for path in sorted(HERE.rglob("*"), reverse=True):
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
    return 0


if __name__ == "__main__":
    sys.exit(main())
