"""Chat templates that cost time or memory: each ends within bounds, however it is written.

Every attack is either refused with one line or rendered; neither may take more than a few seconds of
processor time or hundreds of megabytes.
"""

from __future__ import annotations

import resource
import sys
import time
from datetime import datetime

import pytest

from edge_reasoner.contract.template.render import ChatTemplate
from edge_reasoner.errors import TemplateError

MAX_CPU_S = 4.0
MAX_GROWTH_BYTES = 400 << 20
#: a text, a list and a mapping as large as one operation can make them
TIMES = "{% for i in range(60) %}"
BIG = "{% set s = 'a' * 4000000 %}{% set l = ('a,' * 90000).split(',') %}{% set d = dict(a=l) %}"
LOOP = "{% for i in range(90000) %}"
END = "{% endfor %}"
COLLIDING = "range(0, 90000 * (2 ** 61 - 1), 2 ** 61 - 1)"

#: operation → template; the operation is repeated where once would be cheap
ATTACKS = {
    # comparisons, tests, membership
    "equal texts": BIG + "{% set t = 'a' * 4000000 %}" + LOOP + "{% set x = s == t %}" + END,
    "ordered texts": BIG + "{% set t = s ~ 'b' %}" + LOOP + "{% if s < t %}{% endif %}" + END,
    "equal lists": BIG + "{% set m = l + [] %}" + LOOP + "{% if l == m %}{% endif %}" + END,
    "ordered lists": BIG + "{% set m = l + ['x'] %}" + LOOP + "{% if l < m %}{% endif %}" + END,
    "equal mappings": BIG + "{% set e = dict(a=l + []) %}" + LOOP + "{% if d != e %}{% endif %}" + END,
    "text in text": BIG + LOOP + "{% if 'ab' in s %}{% endif %}" + END,
    "long text in text": BIG + LOOP + "{% if ('a' * 3000 ~ 'b') in s %}{% endif %}" + END,
    "value in list": BIG + LOOP + "{% if 'b' in l %}{% endif %}" + END,
    "list in list": BIG + LOOP + "{% if [1] in l %}{% endif %}" + END,
    "in values": BIG + LOOP + "{% if 1 in d.values() %}{% endif %}" + END,
    "test eq": BIG + "{% set m = l + [] %}" + LOOP + "{% if l is eq(m) %}{% endif %}" + END,
    "test in": BIG + LOOP + "{% if 'b' is in(l) %}{% endif %}" + END,
    "test upper": BIG + "{% set t = s.upper() %}" + LOOP + "{% if t is upper %}{% endif %}" + END,
    "test even": "{{ '%1500000000d' is even }}",
    "test odd": "{{ '%01500000000d' is odd }}",
    "test divisibleby": "{{ '%1500000000d' is divisibleby(5) }}",
    "loop.changed": BIG + LOOP + "{% if loop.changed(l + []) %}{% endif %}" + END,
    "select eq": BIG + "{{ [l, l, l]|select('eq', l + [])|list|length }}" * 500,
    # filters
    "sum of lists": BIG + "{{ ([l] * 2000)|sum(start=[])|length }}",
    "sum of texts": BIG + "{{ (['aaaaaaaa'] * 90000)|sum(start='')|length }}",
    "sort": BIG + LOOP + "{% set x = l|sort %}" + END,
    "sort of long texts": BIG + "{% set x = ([s ~ 'a', s ~ 'b'] * 50000)|sort %}",
    "sort by attributes": "{{ [{'a': 1}]|sort(attribute='a,' * 90000) }}",
    "dictsort": "{% set x = dict(a=1) %}" + LOOP + "{% set y = x|dictsort %}" + END,
    "unique": BIG + LOOP + "{% set x = l|unique|list %}" + END,
    "unique, colliding": "{{ (" + COLLIDING + ")|unique|list|length }}",
    "dict, colliding": "{% set r = " + COLLIDING + "|map('string')|list %}{{ dict(r|groupby(0))|length }}",
    "min of long texts": BIG + "{{ ([s ~ 'a', s ~ 'b'] * 50000)|min|length }}",
    "groupby": BIG + LOOP + "{% set x = l|groupby(0) %}" + END,
    "list of a text": BIG + "{% set x = (s * 4)|list %}",
    "list of a text, often": "{% set s = 'ä' * 90000 %}{% set n = namespace(x=[]) %}"
    + "{% for i in range(9000) %}{% set n.x = [n.x, s|list] %}{% endfor %}",
    "batch": BIG + "{{ l|batch(2000000000, 'x')|list|length }}",
    "slice": BIG + "{{ l|slice(2000000000)|list|length }}",
    "map": BIG + LOOP + "{% set x = l|map('upper')|list %}" + END,
    "map of map": BIG + "{{ l|map('map', 'upper')|map('list')|list|length }}" * 100,
    "reverse": BIG + LOOP + "{% set x = s|reverse %}" + END,
    "first of a text": BIG + LOOP + "{{ s|first }}" + END,
    "upper": BIG + LOOP + "{% set x = s|upper %}" + END,
    "title": BIG + LOOP + "{% set x = s|title %}" + END,
    "capitalize": BIG + LOOP + "{% set x = s|capitalize %}" + END,
    "trim": BIG + LOOP + "{% set x = s|trim %}" + END,
    "trim of many characters": BIG + "{{ s|trim('b' * 2000000 ~ 'a')|length }}",
    "escape": "{{ ('<' * 9000000)|e|length }}",
    "escape again": "{% set n = namespace(x='<') %}"
    + TIMES
    + "{% set n.x = n.x|string|e|string %}"
    + "{% endfor %}",
    "markup and text": BIG + LOOP + "{% set x = ('<' * 3000)|safe + '<' * 3000 %}" + END,
    "default": BIG + LOOP + "{{ (s ~ i)|default('x') }}" + END,
    "tojson separators": "{{ [1, 2, 3]|tojson(separators=('a' * 16000000, 'b' * 16000000)) }}",
    "tojson separators, many": "{{ (range(90000)|list)|tojson(separators=('a' * 90000, ':')) }}",
    "tojson indent": "{{ (range(90000)|list)|tojson(indent=90000)|length }}",
    "tojson indent text": "{{ (range(90000)|list)|tojson(indent='a' * 90000)|length }}",
    "tojson of escapes": "{{ ('\\x01' * 4000000)|tojson(ensure_ascii=true)|length }}" * 9,
    "join separator": "{{ range(90000)|join('a' * 90000) }}",
    "join of lists": BIG + "{{ ([l] * 90000)|join }}",
    "string of a list": BIG + LOOP + "{% set x = l|string %}" + END,
    "string of escapes": "{{ (['\\U000e0001' * 900000] * 9)|string|length }}",
    "indent": "{{ ('\\n' * 900000)|indent(1000, true, true) }}",
    "int of digits": "{{ ('9' * 10000000)|int }}",
    "int of a base": "{{ ('f' * 10000000)|int(0, 16) }}",
    "float of digits": LOOP + "{{ ('1' * 90000)|float }}" + END,
    "wordwrap": BIG + "{{ s|wordwrap(1) }}",
    "urlize": BIG + "{{ ('http://' * 100000)|urlize }}",
    "striptags": "{{ ('<' * 1000000)|striptags }}",
    "pprint": BIG + "{{ l|pprint }}",
    "xmlattr": BIG + "{{ d|xmlattr }}",
    "truncate": BIG + "{{ s|truncate(2000000000, true, s) }}",
    "center": "{{ 'a'|center(2000000000) }}",
    "round": "{{ 1.5|round(10000000) }}",
    # formats
    "named width": "{{ '%(a)1500000000d'|format(a=1) }}",
    "named width, operator": "{{ '%(a)1500000000d' % {'a': 1} }}",
    "nested name": "{{ '%(a(b)c)1500000000d' % {'a(b)c': 1} }}",
    "odd name": "{{ '%(a%b)1500000000d' % {'a%b': 1} }}",
    "precision": "{{ '%.1500000000f'|format(1) }}",
    "precision of a number": "{{ '%.1500000000d' % 1 }}",
    "named precision": "{{ '%(a).1500000000x' % {'a': 1} }}",
    "one name, many times": "{{ ('%(a)s' * 90000) % {'a': 'a' * 90000} }}",
    "repr": "{{ '%r' % (['\\U000e0001' * 900000] * 9) }}",
    # methods
    "split": BIG + LOOP + "{% set x = s.split('a') %}" + END,
    "split of words": LOOP + "{% set x = ('a ' * 90000).split() %}" + END,
    "rsplit": "{% set s = 'a' * 900000 %}{{ s.rsplit('b' ~ 'a' * 450000)|length }}",
    "rfind": "{% set s = 'a' * 900000 %}{{ s.rfind('b' ~ 'a' * 450000) }}",
    "rindex": "{% set s = 'a' * 900000 %}{{ s.rindex('b' ~ 'a' * 450000) }}",
    "rpartition": "{% set s = 'a' * 900000 %}{{ s.rpartition('b' ~ 'a' * 450000)|length }}",
    "find": BIG + LOOP + "{{ s.find('b') }}" + END,
    "count": BIG + LOOP + "{{ s.count('b') }}" + END,
    "strip": BIG + "{{ s.strip('b' * 2000000 ~ 'a')|length }}",
    "splitlines": LOOP + "{% set x = ('\\n' * 90000).splitlines() %}" + END,
    "isalpha": BIG + LOOP + "{{ s.isalpha() }}" + END,
    "swapcase": BIG + LOOP + "{% set x = s.swapcase() %}" + END,
    "upper of what grows": "{{ ('ΐ' * 900000).upper()|length }}" * 90,
    "removeprefix": BIG + LOOP + "{% set x = s.removeprefix('a') %}" + END,
    "partition": BIG + LOOP + "{% set x = s.partition('b') %}" + END,
    "startswith": BIG + LOOP + "{{ s.startswith(s ~ 'a') }}" + END,
    "list.index": BIG + LOOP + "{{ l.index('') }}" + END,
    "list.count": BIG + LOOP + "{{ l.count('b') }}" + END,
    "list.copy": BIG + LOOP + "{% set x = l.copy() %}" + END,
    "mapping.copy": "{% set d = dict([('a', 1), ('b', 2)] * 40000) %}"
    + LOOP
    + "{% set x = d.copy() %}"
    + END,
    "ljust": "{{ 'a'.ljust(1500000000) }}",
    "zfill": "{{ '1'.zfill(1500000000) }}",
    "expandtabs": "{{ ('\\t' * 90000).expandtabs(90000) }}",
    "translate": "{{ ('a' * 90000).translate({97: 'a' * 90000}) }}",
    "encode": BIG + "{{ s.encode('utf-32')|length }}",
    "str.format": "{{ '{:1500000000}'.format(1) }}",
    "str.format_map": "{{ '{a:1500000000}'.format_map({'a': 1}) }}",
    "str.join": "{{ ('a' * 90000).join(range(90000)|map('string')) }}",
    # growth
    "repeated list": BIG + "{{ (l * 20000)|length }}",
    "slices": BIG + LOOP + "{% set x = s[1:] %}" + END,
    "slices of a list": BIG + LOOP + "{% set x = l[1:] %}" + END,
    "sums of texts": "{% set n = namespace(x='') %}" + LOOP + "{% set n.x = n.x + 'aaaaaaaa' %}" + END,
    "sums of lists": "{% set n = namespace(x=[]) %}" + LOOP + "{% set n.x = n.x + [1] %}" + END,
    "doubling by sum": "{% set n = namespace(x=[1]) %}"
    + TIMES
    + "{% set n.x = n.x + [n.x] + [n.x] %}"
    + "{% endfor %}",
    "doubling by groups": "{% set n = namespace(x=[{'a': 1}]) %}"
    + TIMES
    + "{% set n.x = [{'a': 1, 'b': n.x}, {'a': 1, 'b': n.x}]|groupby('a') %}{% endfor %}{{ n.x == 1 }}",
    "doubling by copies": "{% set n = namespace(x={'a': 1}) %}"
    + TIMES
    + "{% set n.x = dict(a=n.x.copy(), b=n.x) %}{% endfor %}{{ n.x|tojson }}",
    "doubling by arguments": "{% macro f(n) %}{{ f(varargs + varargs, *(varargs + varargs)) }}{% endmacro %}"
    + "{{ f(1, 2, 3) }}",
    "doubling by blocks": "{% set x = 'aa' %}" + "{% set x %}{{ x }}{{ x }}{% endset %}" * 60,
    "doubling by filter blocks": "{% macro f(n) %}{% filter upper %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}"
    + "{% endif %}aaaaaaaa{% endfilter %}{% endmacro %}{{ f(39) }}",
    "caller tree": "{% macro f(n) %}{% if n %}{% call f(n - 1) %}{{ caller() }}{% endcall %}{{ caller() }}"
    + "{% else %}{{ caller() }}{{ caller() }}{% endif %}{% endmacro %}{% call f(15) %}x{% endcall %}",
    "deep list": "{% set n = namespace(x=[]) %}" + LOOP + "{% set n.x = [n.x] %}" + END + "{{ n.x }}",
    "deep tuple as a key": "{% set n = namespace(x=()) %}"
    + LOOP
    + "{% set n.x = (n.x,) %}"
    + END
    + "{{ {n.x: 1} }}",
    "cycle": BIG + LOOP + "{{ loop.cycle(s, s) }}" + END,
    # numbers
    "power": "{{ 2 ** 4000 ** 2 }}",
    "power of powers": "{% set n = namespace(x=3) %}" + TIMES + "{% set n.x = n.x ** 9 %}{% endfor %}",
    "products": "{% set n = namespace(x=3) %}" + LOOP + "{% set n.x = n.x * n.x %}" + END,
    "sums of numbers": "{% set n = namespace(x=2 ** 4000) %}" + LOOP + "{% set n.x = n.x + n.x %}" + END,
    "sum filter of numbers": "{{ ([2 ** 4090] * 90000)|sum }}",
    "long number": "{{ " + "9" * 200_000 + " }}",
    "long hexadecimal number": "{{ 0x" + "f" * 200_000 + " * 1 }}",
    "endless range": "{{ range(10 ** 1000)|length }}",
    # control flow
    "recursive loop": "{% for i in range(9) recursive %}{{ loop(range(9)) }}{% endfor %}",
    "recursive data": "{% for i in messages recursive %}{{ loop(messages) }}{% endfor %}",
    "nested empty loops": "{% for i in range(300) %}{% for j in range(300) %}"
    + "{% set x = 1 %}" * 2000
    + END * 2,
    "many empty outputs": LOOP + "{{ '' }}" * 4000 + END,
    "many small outputs": LOOP + "{{ 1 }}" * 4000 + END,
    "many empty lists": "{% set n = namespace() %}" + LOOP + "{% set n.x = [" + "[]," * 4000 + "] %}" + END,
    "many mappings": "{% set n = namespace() %}" + LOOP + "{% set n.x = [" + "{}," * 4000 + "] %}" + END,
    "loop filter": "{% for i in range(90000) if range(90000)|list|length %}{% endfor %}",
    "date": "{{ strftime_now('%900000000d') }}" * 100,
    # to be read at all
    "many outputs": "{{ x }}" * 37_000,
    "many conditions": "{% if x %}{% endif %}" * 12_000,
    "many branches": "{% if x %}" + "{% elif x %}" * 20_000 + "{% endif %}",
    "many additions": "{{ 1" + "+1" * 100_000 + " }}",
    "many comparisons": "{{ 1" + "<1" * 100_000 + " }}",
    "many attributes": "{{ x" + ".a" * 100_000 + " }}",
    "many filters": "{{ x" + "|e" * 100_000 + " }}",
    "many signs": "{{ " + "-" * 200_000 + "1 }}",
    "many negations": "{{ " + "not " * 60_000 + "1 }}",
    "many brackets": "{{ " + "[" * 100_000 + "]" * 100_000 + " }}",
    "many arguments": "{{ f(" + "1," * 100_000 + ") }}",
    "many macros": "{% macro f() %}{% endmacro %}" * 9_000,
    "macros in macros": "{% macro f() %}{{ x }}" * 5_000 + "{% endmacro %}" * 5_000,
    "many comments": "{##}" * 60_000,
    "many open comments": "{#" * 100_000,
    "many open blocks": "{%" * 100_000,
    "many spaces": "{{" + " " * 250_000 + "x }}",
    "many raw blocks": "{% raw %}" * 20_000,
    "many newlines": "\n" * 250_000 + "{{ x }}",
    "many conditionals": "{{ " + "1 if 1 else " * 20_000 + "1 }}",
    "long text": "{{ '" + "\\n" * 120_000 + "' }}",
}


def _peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@pytest.mark.parametrize("attack", ATTACKS)
def test_costs_are_bounded(attack: str) -> None:
    """Rendered or refused in one line: in either case with little time and memory."""
    before_bytes, start_s = _peak_bytes(), time.process_time()
    try:
        template = ChatTemplate(
            ATTACKS[attack], special_tokens={}, clock=time.process_time, now=lambda: datetime(2024, 7, 26)
        )
        template.render([{"role": "user", "content": "a"}])
    except TemplateError as error:
        assert "\n" not in str(error) and str(error).startswith("chat template")
    assert time.process_time() - start_s < MAX_CPU_S
    assert _peak_bytes() - before_bytes < MAX_GROWTH_BYTES
