"""Features of a prompt, from simple lexical rules.

No rule was fitted to data; the word lists name what the intents mean in the languages most often asked. A
rule that fires wrongly costs the gate a little accuracy, never correctness. Field order is stable: the gate's
calibration refers to it.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Literal

from edge_reasoner.preprocess.language import identify

Intent = Literal[
    "maths", "code", "translation", "summary", "reasoning", "creative", "choice", "chat", "question"
]

_MAX_CHARS = 20_000
# Every pattern here takes time that grows as the text does: a run is tried from its beginning only, and what
# may stand between two words is bounded (tests/hostile/test_patterns.py).
_HAN_DIGITS = "一二两三四五六七八九十百千万亿"
_NUMBER = re.compile(
    r"(?<![A-Za-z0-9_.])[$€£¥]?\d[\d.,]*%?"
    rf"|(?<![{_HAN_DIGITS}])[{_HAN_DIGITS}]+(?=[个只元块米天年人本张次倍])"
)
_OPERATOR = re.compile(r"(?<=[\w)\s])[+*/=×÷^<>≤≥√∫∑−](?=[\w(\s])|(?<=\d)\s*-\s*(?=\d)|(?<=\d)x(?=\d)")
_SENTENCE = re.compile(r"(?<![.!?。！？؟])[.!?。！？؟]+(?:\s|$)|[。！？]|\n+")
_CHOICE = re.compile(r"(?:^|\n|\s)\(?[A-Ea-e][).:]\s+\S")
_WORD = re.compile(r"[^\W\d_]+|\d+")
_CJK = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")


def _words(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern, re.IGNORECASE)


_CODE = _words(
    r"```|\b(?:def|class|return|import|function|const|var|void|printf|println|select\s.{1,200}\sfrom|regex|python|"
    r"javascript|typescript|java|c\+\+|rust|golang|sql|bash|html|css|compile|stack trace|traceback|"
    r"debug|refactor|unit test|algorithm|api|json|yaml|docker)\b|[;{}]\s*\n|=>|==|!=|代码|程序|函数"
)
_MATHS = _words(
    r"\b(?:calculate|compute|solve|equation|integral|derivative|percent(?:age)?|how (?:many|much|far|long|"
    r"old)|"
    r"sum of|product of|average|probability|ratio|remainder|divided|multipl\w+|subtract|triangle|"
    r"perimeter|area|"
    r"square root|prime|factorial|matrix|theorem|proof|prove|twice|half|total|"
    r"berechne|wie ?viele?|gleichung|prozent|wahrscheinlichkeit|durchschnitt|"
    r"calculer?|combien|équation|pourcentage|cuántos?|cuántas?|calcula|ecuación|porcentaje|quanti|quante|"
    r"calcola|quantos|quantas|hoeveel|bereken|сколько|вычисли|уравнение)\b|多少|几个|计算|求|方程|一共|いくつ|計算|몇"
)
_TRANSLATION = _words(
    r"\b(?:translat\w+|übersetz\w*|traduire|traduis\w*|traduction|traduc\w+|traduz\w*|traduci|vertaal|"
    r"переведи|"
    r"(?:in|into|auf|en) (?:english|german|french|spanish|chinese|deutsch|englisch|français|anglais|"
    r"inglés|español))"
    r"\b|翻译|翻訳|번역"
)
_SUMMARY = _words(
    r"\b(?:summari[sz]e|summary|tl;?dr|key points|shorten|condense|zusammenfass\w*|fasse|résum\w+|resum\w+|"
    r"riassum\w+|samenvat\w*|кратко)\b|总结|概括|摘要|要約|요약"
)
_REASONING = _words(
    r"\b(?:why|explain|prove|derive|compare|contrast|evaluate|analy[sz]e|implications?|trade-?offs?|justify|"
    r"step[- ]by[- ]step|critique|consequences|warum|erkläre|begründe|vergleiche|beweise|pourquoi|explique|"
    r"compare[rz]?|por qué|explica|perché|spiega|waarom|почему|объясни|"
    r"докажи)\b|为什么|解释|证明|分析|比较|なぜ|説明|왜"
)
_CREATIVE = _words(
    r"\b(?:write (?:a|an|me|some)|poem|story|haiku|lyrics|essay|slogan|brainstorm|imagine|invent|"
    r"gedicht|geschichte|poème|histoire|poema|cuento|poesia|gedichtje|стих)\b|写一|诗|故事|作文"
)
_CHAT = _words(
    r"^\W*(?:hi|hello|hey|good (?:morning|evening|night|afternoon)|thanks?|thank you|bye|goodbye|how are you|"
    r"what'?s up|who are you|hallo|guten \w+|danke|tschüss|bonjour|salut|merci|hola|gracias|ciao|grazie|olá|"
    r"obrigad[oa]|hoi|привет|спасибо|你好|您好|谢谢|再见|こんにちは|ありがとう|안녕)"
)
_INSTRUCTION = _words(
    r"^\W*(?:please\s+)?(?:write|list|give|name|make|create|generate|tell|show|find|turn|set|switch|open|"
    r"close|"
    r"calculate|compute|solve|translate|summari[sz]e|explain|describe|convert|sort|rewrite|correct|implement|"
    r"schreibe?|nenne|gib|mache?|erkläre?|übersetze?|écris|donne|explique|escribe|dame|explica|scrivi|請|请|写)"
)
_QUESTION = _words(
    r"[?？؟]|^\W*(?:what|who|whom|where|when|why|how|which|whose|is|are|was|were|do|does|did|can|could|should|"
    r"would|will|has|have|wer|was|wo|wann|warum|wie|welche\w*|qui|que|quoi|où|quand|pourquoi|comment|quel\w*|"
    r"qué|quién|dónde|cuándo|cómo|cuál|chi|cosa|dove|quando|come|quale)\b|[吗呢]"
)
_STEP = _words(
    r"\b(?:then|after that|afterwards?|next|finally|first(?:ly)?|second(?:ly)?|each|every|per|remaining|"
    r"left over|"
    r"more than|less than|fewer than|times as|if|unless|suppose|assume|given that|therefore|because|"
    r"dann|danach|zuerst|schließlich|jede\w*|falls|wenn|puis|ensuite|d'abord|enfin|chaque|luego|después|"
    r"primero|cada|poi|prima|ogni|затем|потом|каждый|если)\b|然后|接着|最后|首先|每|如果|剩下|比.{1,8}[多少]"
)


@dataclass(frozen=True)
class PromptFeatures:
    """What the gate reads of a prompt. `is_*` are 0 or 1; everything else is a count."""

    language: str
    language_confidence: float
    intent: Intent
    chars: int
    words: int
    sentences: int
    numbers: int
    operators: int
    steps: int
    questions: int
    longest_word_chars: int
    is_question: int
    is_instruction: int
    is_maths: int
    is_code: int
    is_translation: int
    is_summary: int
    is_reasoning: int
    is_creative: int
    is_choice: int
    is_chat: int

    def as_dict(self) -> dict[str, str | float]:
        """All fields in their stable order."""
        return asdict(self)

    def numeric(self) -> dict[str, float]:
        """The numeric fields in their stable order."""
        return {name: float(v) for name, v in asdict(self).items() if not isinstance(v, str)}


def extract(text: str) -> PromptFeatures:
    """Features of a prompt; of a very long one, of its first and last 10,000 characters."""
    chars = len(text)
    if chars > _MAX_CHARS:
        text = text[: _MAX_CHARS // 2] + "\n" + text[-_MAX_CHARS // 2 :]
    language = identify(text)
    words = _WORD.findall(text)
    cjk = len(_CJK.findall(text))
    numbers, operators = len(_NUMBER.findall(text)), len(_OPERATOR.findall(text))
    flags = {
        "is_question": bool(_QUESTION.search(text)),
        "is_instruction": bool(_INSTRUCTION.search(text)),
        "is_maths": ((numbers >= 2 and operators > 0) or (numbers >= 1 and bool(_MATHS.search(text))))
        or _is_bare_sum(text, operators),
        "is_code": bool(_CODE.search(text)),
        "is_translation": bool(_TRANSLATION.search(text)),
        "is_summary": bool(_SUMMARY.search(text)),
        "is_reasoning": bool(_REASONING.search(text)),
        "is_creative": bool(_CREATIVE.search(text)),
        "is_choice": len(_CHOICE.findall(text)) >= 2,
        "is_chat": bool(_CHAT.search(text)) and len(words) <= 12,
    }
    return PromptFeatures(
        language=language.code,
        language_confidence=language.confidence,
        intent=_intent(flags),
        chars=chars,
        # a CJK word has about two characters
        words=len([word for word in words if not _CJK.search(word)]) + cjk // 2,
        sentences=max(1, len(_SENTENCE.findall(text))),
        numbers=numbers,
        operators=operators,
        steps=len(_STEP.findall(text)),
        questions=text.count("?") + text.count("？"),
        longest_word_chars=max((len(word) for word in words), default=0),
        **{name: int(value) for name, value in flags.items()},
    )


def _is_bare_sum(text: str, operators: int) -> bool:
    return operators > 0 and sum(c.isdigit() for c in text) * 3 > len(text.replace(" ", ""))


def _intent(flags: dict[str, bool]) -> Intent:
    # the first that applies: the more specific the task, the earlier
    order: tuple[tuple[str, Intent], ...] = (
        ("is_translation", "translation"),
        ("is_summary", "summary"),
        ("is_code", "code"),
        ("is_maths", "maths"),
        ("is_choice", "choice"),
        ("is_creative", "creative"),
        ("is_reasoning", "reasoning"),
        ("is_chat", "chat"),
    )
    return next((intent for flag, intent in order if flags[flag]), "question")
