"""The source of a chat template to jinja's tree, within bounds: tokens, depth, and what a tree may hold."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from jinja2 import Environment, nodes
from jinja2.exceptions import TemplateSyntaxError
from jinja2.ext import Extension, loopcontrols
from jinja2.lexer import Token, TokenStream
from jinja2.parser import Parser

#: the largest template of the supported families has some 6,000
MAX_TOKENS: Final = 30_000
#: brackets inside each other, and blocks
MAX_OPEN: Final = 40
_OPENING, _CLOSING = frozenset(("lparen", "lbracket", "lbrace")), frozenset(("rparen", "rbracket", "rbrace"))


def parse(source: str) -> nodes.Template:
    """The tree of a template. Raises jinja2.TemplateSyntaxError, RecursionError, ValueError.

    The options are those that transformers uses for chat templates.
    """
    environment = Environment(  # nothing here is HTML
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Bounds, _Generation, loopcontrols],
        cache_size=0,
    )
    return Parser(environment, source).parse()


class _Bounds(Extension):
    """Counts tokens and open brackets before the parser takes them: it recurses."""

    def filter_stream(self, stream: TokenStream) -> Iterator[Token]:
        """The same tokens. Raises TemplateSyntaxError past the bounds."""
        depth = 0
        for number, token in enumerate(stream):
            if number > MAX_TOKENS:
                raise TemplateSyntaxError(f"more than {MAX_TOKENS} tokens", token.lineno)
            if token.type in _OPENING:
                depth += 1
                if depth > MAX_OPEN:
                    raise TemplateSyntaxError(f"more than {MAX_OPEN} brackets are open", token.lineno)
            elif token.type in _CLOSING:
                depth -= 1
            yield token


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}` marks assistant text for training; here it is just its body."""

    tags = {"generation"}  # noqa: RUF012  # jinja's own declaration is a plain set

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Returns the block's body."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
