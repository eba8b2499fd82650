"""Templates and tokenizers composed at random of the parts they are made of: sound in form, odd in content.

Mutated bytes rarely get past a parser; these do. The bytes only choose: the same ones make the same file.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import Any

_VALUES = (
    *("messages", "messages[0]", "messages[0].content", "x", "n.x", "loop", "nothing", "none", "true", "0"),
    *("1", "-1", "7", "2 ** 60", "1.5", "1e300", "''", "'a'", "'%s %d'", "'a b\\n c' * 50", "'<é你🙂>'"),
    *("[]", "[1, 'a', none]", "{}", "{'a': [1, {'b': 2}]}", "(1,)", "range(5)", "range", "f", "n", "caller"),
    *("bos_token", "namespace(a=1)", "dict(a=1)", "strftime_now", "loop.index", "loop.changed", "varargs"),
)
_BINARY = (
    "+",
    "-",
    "*",
    "/",
    "//",
    "%",
    "**",
    "~",
    "==",
    "!=",
    "<",
    "<=",
    ">",
    ">=",
    "in",
    "not in",
    "and",
    "or",
)
_FILTERS = (
    *(
        "abs",
        "attr('a')",
        "capitalize",
        "count",
        "default('a')",
        "default(x, true)",
        "dictsort",
        "e",
        "first",
    ),
    *(
        "float",
        "format(1)",
        "format(a=1)",
        "groupby('role')",
        "groupby(0)",
        "indent(2, true)",
        "int",
        "items",
    ),
    *("int(0, 36)", "join('-')", "join", "join(attribute='role')", "last", "length", "list", "lower", "max"),
    *("map('upper')", "map(attribute='role')", "map('map', 'string')", "min", "reject", "rejectattr('role')"),
    *("replace('a', 'bb')", "reverse", "safe", "select('in', 'ab')", "select", "selectattr('a', 'eq', 1)"),
    *("sort", "sort(reverse=true)", "sort(attribute='role')", "string", "sum", "sum(start=[])", "title"),
    *("tojson", "tojson(indent=2)", "tojson(ensure_ascii=true)", "trim", "trim('a')", "unique", "upper"),
)
_TESTS = (
    *(
        "boolean",
        "callable",
        "defined",
        "divisibleby(3)",
        "eq(1)",
        "even",
        "odd",
        "float",
        "ge(1)",
        "in('ab')",
    ),
    *(
        "integer",
        "iterable",
        "lower",
        "lt('a')",
        "mapping",
        "none",
        "number",
        "sameas(1)",
        "sequence",
        "string",
    ),
)
_METHODS = (
    *("split()", "split('a')", "rsplit('a', 1)", "strip()", "strip('ab')", "upper()", "title()", "join(x)"),
    *("replace('a', 'b')", "find('a')", "rfind('b')", "startswith('a')", "splitlines()", "partition(' ')"),
    *("items()", "keys()", "values()", "get('a')", "copy()", "count(1)", "index(1)", "role", "content", "0"),
    *("a", "removeprefix('a')", "isdigit()", "endswith(('a', 'b'))", "format(1)", "ljust(9)", "pop()"),
)


def expression(rng: random.Random, depth: int) -> str:
    """An expression of jinja's grammar."""
    if depth <= 0 or rng.random() < 0.15:
        return rng.choice(_VALUES)
    one, two = expression(rng, depth - 1), expression(rng, depth - 2)
    forms = (
        f"({one} {rng.choice(_BINARY)} {two})",
        f"({one})|{rng.choice(_FILTERS)}",
        f"({one})|{rng.choice(_FILTERS)}|{rng.choice(_FILTERS)}",
        f"({one}) is {rng.choice(_TESTS)}",
        f"({one}).{rng.choice(_METHODS)}",
        f"({one})[{rng.choice(('0', '-1', '::-1', '1:', ':2', repr('a'), two))}]",
        f"({one} if {two} else {one})",
        f"[{one}, {two}]",
        f"{{'a': {one}, 'b': {two}}}",
        f"({one})({rng.choice(('', two, f'{one}, a={two}', f'*{two}', f'**{two}'))})",
        f"f({one})",
        f"not {one}",
    )
    return rng.choice(forms)


def template(data: bytes) -> str:
    """A template of nested statements that the bytes choose."""
    rng = random.Random(data)
    return (
        "{% set n = namespace(x='aa') %}{% macro f(a, b=1) %}"
        + _body(rng, 1)
        + "{% endmacro %}"
        + _body(rng, 3)
    )


def _body(rng: random.Random, depth: int) -> str:
    return "".join(_statement(rng, depth) for _ in range(rng.choice((1, 1, 2, 3))))


def _statement(rng: random.Random, depth: int) -> str:
    value = expression(rng, rng.choice((1, 2, 3, 4)))
    if depth <= 0:
        return f"{{{{ {value} }}}}"
    inner = _body(rng, depth - 1)
    forms = (
        f"{{{{ {value} }}}}",
        f"{{% set x = {value} %}}",
        f"{{% set n.x = {value} %}}",
        f"{{% set x %}}{inner}{{% endset %}}",
        f"{{% for x in {value} %}}{inner}{{% else %}}{inner}{{% endfor %}}",
        f"{{% for x in range(60) %}}{inner}{{% endfor %}}",
        f"{{% for x in {value} recursive %}}{inner}{{{{ loop({value}) }}}}{{% endfor %}}",
        f"{{% for x in {value} if {value} %}}{inner}{{% endfor %}}",
        f"{{% for x, y in {value} %}}{inner}{{% break %}}{{% endfor %}}",
        f"{{% if {value} %}}{inner}{{% elif {value} %}}{inner}{{% endif %}}",
        f"{{% filter {rng.choice(_FILTERS)} %}}{inner}{{% endfilter %}}",
        f"{{% call f({value}) %}}{inner}{{% endcall %}}",
        f"{{% with x = {value} %}}{inner}{{% endwith %}}",
        f"{{% macro f(a, b={value}) %}}{inner}{{{{ f(b) }}}}{{% endmacro %}}",
    )
    return rng.choice(forms)


_TEXTS = ("a", " ", "▁", "é", "##", "", "aa", "你", "\ufffd", "x" * 64, "x" * 65, "\x00", "🙂")
_EXPRESSIONS = (
    r"\s+",
    " {2,}",
    r"\p{N}",
    ".",
    "(a+)+$",
    "a*",
    r" ?[^\s\p{L}]+|\s+(?!\S)",
    r"\A▁",
    "[a-z]{1,9}",
)
_NUMBERS = (0, 1, 2, 5, 16, 17, 100, 255, 4096, 1 << 21, 1 << 31, 1 << 32, (1 << 64) - 1, -1)


def tokenizer(data: bytes, vocab: dict[str, int], merges: Sequence[Any]) -> bytes:
    """A tokenizer.json of parts that the bytes choose."""
    rng = random.Random(data)
    parts = _Parts(rng, vocab, list(merges))
    made = {
        "version": "1.0",
        "truncation": rng.choice((None, {"max_length": 5, "strategy": "LongestFirst", "stride": 9})),
        "padding": None,
        "added_tokens": [parts.added() for _ in range(rng.choice((0, 1, 3)))],
        "normalizer": parts.maybe(parts.normalizer),
        "pre_tokenizer": parts.maybe(parts.pre_tokenizer),
        "post_processor": parts.maybe(parts.processor),
        "decoder": parts.maybe(parts.decoder),
        "model": parts.model(),
    }
    return json.dumps(made).encode()


class _Parts:
    """Random parts of each kind."""

    def __init__(self, rng: random.Random, vocab: dict[str, int], merges: list[Any]) -> None:
        self._rng = rng
        self._vocab = vocab
        self._merges = merges

    def maybe(self, make: Any) -> Any:
        """A part, a sequence of parts, or none."""
        if self._rng.random() < 0.25:
            return None
        if self._rng.random() < 0.4:
            name = {
                "normalizer": "normalizers",
                "pre_tokenizer": "pretokenizers",
                "processor": "processors",
                "decoder": "decoders",
            }[make.__name__]
            return {"type": "Sequence", name: [make() for _ in range(self._rng.choice((1, 2, 3, 8)))]}
        return make()

    def _text(self) -> str:
        return self._rng.choice(_TEXTS if self._rng.random() < 0.2 else ("a", " ", "▁", "é"))

    def _number(self) -> int:
        return self._rng.choice(_NUMBERS if self._rng.random() < 0.1 else (0, 1, 2, 16))

    def _flag(self) -> bool:
        return self._rng.random() < 0.5

    def _token(self) -> str:
        return self._rng.choice((self._text(), self._rng.choice(list(self._vocab))))

    def _pattern(self) -> dict[str, str]:
        if self._flag():
            return {"String": self._text()}
        return {"Regex": self._rng.choice(_EXPRESSIONS)}

    def _replace(self) -> dict[str, Any]:
        return {"type": "Replace", "pattern": self._pattern(), "content": self._text()}

    def _metaspace(self) -> dict[str, Any]:
        scheme = self._rng.choice(("always", "never", "first"))
        return {
            "type": "Metaspace",
            "replacement": self._text(),
            "prepend_scheme": scheme,
            "split": self._flag(),
        }

    def _byte_level(self) -> dict[str, Any]:
        flags = {name: self._flag() for name in ("add_prefix_space", "trim_offsets", "use_regex")}
        return {"type": "ByteLevel", **flags}

    def added(self) -> dict[str, Any]:
        """An added token."""
        flags = {name: self._flag() for name in ("single_word", "lstrip", "rstrip", "normalized", "special")}
        return {"id": self._rng.choice((len(self._vocab), self._number())), "content": self._token(), **flags}

    def normalizer(self) -> dict[str, Any]:
        """What changes the text."""
        plain = ("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "Nmt", "ByteLevel")
        bert = {name: self._flag() for name in ("clean_text", "handle_chinese_chars", "lowercase")}
        return self._rng.choice(
            (
                {"type": self._rng.choice(plain)},
                self._replace(),
                self._replace(),
                {"type": "Prepend", "prepend": self._text()},
                {"type": "Strip", "strip_left": self._flag(), "strip_right": self._flag()},
                {"type": "BertNormalizer", "strip_accents": self._rng.choice((None, True)), **bert},
                {
                    "type": "Precompiled",
                    "precompiled_charsmap": self._rng.choice(("", "AAAA", "BAAAAAEAAABhAA==")),
                },
            )
        )

    def pre_tokenizer(self) -> dict[str, Any]:
        """What cuts the text."""
        behavior = self._rng.choice(
            ("Removed", "Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous")
        )
        return self._rng.choice(
            (
                {
                    "type": self._rng.choice(
                        ("BertPreTokenizer", "Whitespace", "WhitespaceSplit", "UnicodeScripts")
                    )
                },
                self._byte_level(),
                self._metaspace(),
                {"type": "Punctuation", "behavior": behavior},
                {"type": "Digits", "individual_digits": self._flag()},
                {"type": "Split", "pattern": self._pattern(), "behavior": behavior, "invert": self._flag()},
            )
        )

    def processor(self) -> dict[str, Any]:
        """What adds special tokens."""
        sep, cls = [self._token(), self._number()], [self._token(), self._number()]
        special = {"id": "x", "ids": [self._number()], "tokens": [self._token()]}
        pieces = [{"SpecialToken": {"id": self._rng.choice("xy"), "type_id": 0}}]
        pieces += [{"Sequence": {"id": "A", "type_id": 0}}] * self._rng.choice((1, 1, 2))
        pair = [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"]
        return self._rng.choice(
            (
                self._byte_level(),
                {"type": "BertProcessing", "sep": sep, "cls": cls},
                {"type": "RobertaProcessing", "sep": sep, "cls": cls},
                {
                    "type": "TemplateProcessing",
                    "single": pieces,
                    "pair": pair,
                    "special_tokens": {"x": special},
                },
            )
        )

    def decoder(self) -> dict[str, Any]:
        """What makes text again."""
        return self._rng.choice(
            (
                self._byte_level(),
                self._metaspace(),
                self._replace(),
                {"type": self._rng.choice(("Fuse", "ByteFallback", "CTC"))},
                {"type": "WordPiece", "prefix": self._text(), "cleanup": self._flag()},
                {"type": "BPEDecoder", "suffix": self._text()},
                {"type": "Strip", "content": self._text(), "start": self._number(), "stop": self._number()},
            )
        )

    def model(self) -> dict[str, Any]:
        """What finds tokens."""
        affix = self._rng.choice((None, None, None, self._text()))
        entries = [[token, -float(i)] for token, i in list(self._vocab.items())[:50]]
        return self._rng.choice(
            (
                {
                    "type": "BPE",
                    "dropout": self._rng.choice((None, 0.5)),
                    "unk_token": self._rng.choice((None, self._token())),
                    "continuing_subword_prefix": affix,
                    "end_of_word_suffix": self._rng.choice((None, None, self._text())),
                    "fuse_unk": self._flag(),
                    "byte_fallback": self._flag(),
                    "ignore_merges": self._flag(),
                    "vocab": self._vocab,
                    "merges": [] if affix else self._merges,
                },
                {
                    "type": "WordPiece",
                    "unk_token": self._token(),
                    "continuing_subword_prefix": self._text(),
                    "max_input_chars_per_word": self._number(),
                    "vocab": self._vocab,
                },
                {"type": "WordLevel", "vocab": self._vocab, "unk_token": self._token()},
                {
                    "type": "Unigram",
                    "unk_id": self._rng.choice((None, 0, self._number())),
                    "vocab": entries,
                    "byte_fallback": self._flag(),
                },
            )
        )
