"""Keys by their shape, passwords and keys by the name before them.

Every pattern is anchored on a literal or has a bounded length, so that a search takes time linear in the
text. Texts are folded (`fold.py`); names are compared in folded form and in any letter case.
"""

from __future__ import annotations

import re

from edge_reasoner.privacy.fold import folded

#: issuers' tokens; the border before them is no ASCII letter or digit
_TOKENS = (
    # source hosting and packages
    r"gh[pousr]_[A-Za-z0-9]{16,}|github_pat_[A-Za-z0-9_]{16,}|gl[a-z]{2,5}-[A-Za-z0-9_-]{16,}",
    r"npm_[A-Za-z0-9]{16,}|pypi-[A-Za-z0-9_-]{16,}|rubygems_[a-f0-9]{16,}|dckr_[a-z]{2,4}_[A-Za-z0-9_-]{16,}",
    r"ATATT3[A-Za-z0-9_=-]{16,}|ATBB[A-Za-z0-9]{20,}|CLOJARS_[a-f0-9]{20,}",
    # chat services
    r"xox[a-z]-[A-Za-z0-9-]{10,}|xapp-[A-Za-z0-9-]{10,}|[0-9]{8,10}:AA[A-Za-z0-9_-]{30,}",
    r"[MNO][A-Za-z0-9_-]{23,25}\.[A-Za-z0-9_-]{6}\.[A-Za-z0-9_-]{27,}",
    # clouds
    r"(?:AKIA|ASIA|ABIA|ACCA|AGPA|AIDA|AROA|ANPA)[A-Z0-9]{12,}|AIza[A-Za-z0-9_-]{30,}|ya29\.[A-Za-z0-9_-]{16,}",
    r"GOCSPX-[A-Za-z0-9_-]{16,}|do[opr]_v1_[a-f0-9]{20,}|LTAI[A-Za-z0-9]{12,}|AKID[A-Za-z0-9]{16,}",
    r"dapi[a-f0-9]{32}|hv[sbr]\.[A-Za-z0-9_-]{20,}",
    r"dp\.(?:pt|st|ct)\.[A-Za-z0-9._-]{20,}|FlyV1 [A-Za-z0-9_,=/+-]{20,}",
    # models
    r"sk-[A-Za-z0-9_-]{16,}|hf_[A-Za-z0-9]{16,}|gsk_[A-Za-z0-9]{20,}|r8_[A-Za-z0-9]{20,}|xai-[A-Za-z0-9]{20,}",
    r"nvapi-[A-Za-z0-9_-]{20,}|pplx-[A-Za-z0-9]{20,}|AQ\.[A-Za-z0-9_-]{30,}",
    # payment, mail, telephone, work
    r"[srp]k_(?:live|test)_[A-Za-z0-9]{10,}|whsec_[A-Za-z0-9+/]{16,}|sq0[a-z]{3}-[A-Za-z0-9_-]{20,}",
    r"SG\.[A-Za-z0-9_-]{16,}\.[A-Za-z0-9_-]{16,}|key-[a-f0-9]{32}",
    r"xkeysib-[a-f0-9]{20,}|shp(?:at|ss|ca|pa)_[a-f0-9]{20,}",
    r"(?:AC|SK)[a-f0-9]{32}|PMAK-[a-f0-9]{20,}|lin_api_[A-Za-z0-9]{20,}",
    r"glsa_[A-Za-z0-9_]{20,}|sntry[su]_[A-Za-z0-9_=+/]{20,}",
    r"ntn_[A-Za-z0-9]{20,}|secret_[A-Za-z0-9]{40,}|tskey-[a-z]+-[A-Za-z0-9-]{16,}|ops_eyJ[A-Za-z0-9_-]{20,}",
    r"pat[A-Za-z0-9]{14}\.[a-f0-9]{32,}|NRAK-[A-Z0-9]{20,}|AGE-SECRET-KEY-1[A-Z0-9]{20,}",
    # signed tokens, with or without a signature
    r"eyJ[A-Za-z0-9_-]{12,}\.[A-Za-z0-9_-]{8,}(?:\.|\b)",
)
_TOKEN = re.compile(rf"(?<![A-Za-z0-9])(?:{'|'.join(_TOKENS)})")
_ANYWHERE = re.compile(
    r"-{2,5} ?BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY|PuTTY-User-Key-File-[0-9]"
    r"|hooks\.slack\.com/(?:services|workflows)/T|discord(?:app)?\.com/api/webhooks/[0-9]|AccountKey=[A-Za-z0-9+/]{20}"
    r"|SharedAccessKey=[A-Za-z0-9+/]{20}|[?&](?:sig|X-Amz-Signature|X-Goog-Signature|access_token|api_?key)=[A-Za-z0-9%+/._-]{12}"
    r"|(?:Bearer|Basic|Token)[ :]{1,3}(?=[A-Za-z0-9._~+/=-]{0,200}[0-9])[A-Za-z0-9._~+/=-]{16}",
    re.IGNORECASE,
)
#: no token is shorter than this in a row
_LONG_WORD = re.compile(r"(?<![A-Za-z0-9_+/=,-])[A-Za-z0-9_+/=,-]{15}")
_ANYWHERE_HINTS = (
    *("private key", "user-key-file", "slack.com/", "webhooks", "accountkey=", "sharedaccesskey=", "sig="),
    *("gnature=", "access_token=", "api_key=", "apikey=", "bearer", "basic", "token"),
)

#: names of what is always a secret; anything may stand before them (`DB_PASSWORD`, `userPassword`)
_STRONG = (
    "password|passwd|passwort|kennwort|passcode|passphrase|pass phrase|losungswort|zugangscode|"
    "mot de passe|contraseña|contrasenya|palavra-passe|palavra passe|parola d'ordine|wachtwoord|"
    "lösenord|adgangskode|passord|salasana|hasło|jelszó|şifre|mật khẩu|kata sandi|kata laluan|пароль|"
    "лозинка|парола|密码|密碼|口令|パスワード|暗証番号|비밀번호|암호|पासवर्ड|"
    "كلمة المرور|كلمة السر|סיסמה|סיסמא|รหัสผ่าน|"
    "κωδικός πρόσβασης"
)
#: short for passwords, as words of their own
_SHORT = "pwd|pass|passw|pw|pswd|psw|mdp|senha|heslo|parola|parolă|clave"
#: names that other things have too: words of their own
_WEAK = (
    "secret|client[ _.-]?secret|api[ _.-]?key|apikey|access[ _.-]?key|secret[ _.-]?key|"
    "secret[ _.-]?access[ _.-]?key|private[ _.-]?key|encryption[ _.-]?key|signing[ _.-]?key|"
    "access[ _.-]?token|auth[ _.-]?token|refresh[ _.-]?token|bearer[ _.-]?token|session[ _.-]?token|"
    "id[ _.-]?token|token|credential|credentials|api[ _.-]?secret|auth[ _.-]?key|master[ _.-]?key|"
    "account[ _.-]?key|storage[ _.-]?key|license[ _.-]?key|webhook[ _.-]?secret|authorization|"
    "x-api-key|密钥|金鑰|密鑰|令牌|シークレット|ключ доступа|токен"
)
_STRONG_HINTS = tuple(folded(name).lower() for name in _STRONG.split("|"))
_WEAK_HINTS = tuple(
    folded(name).lower()
    for name in (
        *_SHORT.split("|"),
        "secret",
        "key",
        "token",
        "credential",
        "authorization",
        *_WEAK.split("|"),
    )
    if "[" not in name
)
#: what stands between a name and its value
_QUOTES = r"[\\\"'` *_\])]{0,6}"
_BETWEEN = (
    rf"{_QUOTES}[ \t]{{0,3}}(?P<by>=>|:=|==?|:(?!//)|\b(?:is|was|ist|lautet|est|es|è|é)\b"
    r"(?:[ \t]{0,2}:)?|\bto\b|\bby\b|\(|是:?|为:?|為:?|は|이|는|->|=|>|,|\|)[ \t*_]{0,4}(?:\n[ \t]{0,8})?"
)
_VALUE = r"(?P<quote>[\\]{0,3}[\"'`])?(?P<value>[^\s\"'`]{1,200})(?P<after>[^\n]{0,24})"
_STRONG_RULE = re.compile(folded(rf"(?:{_STRONG})s?{_BETWEEN}{_VALUE}"), re.IGNORECASE)
#: what the password is for may stand between: what follows must then look like one
_OWNED = r"[ \t](?:for|of|to|on|at|für|von|zu[mr]?|pour|de|du|del|para|от|для|к)[ \t][^\n.:=?!]{1,40}?"
_OWNED_RULE = re.compile(
    folded(
        rf"(?:{_STRONG}){_OWNED}[ \t]{{0,2}}(?:=|:|\b(?:is|ist|lautet|est|es)\b:?)[ \t]{{0,3}}[\"'`]?"
        r"(?P<value>[!-~]{4,64})"
    ),
    re.IGNORECASE,
)
#: a password right after its name; letters of other scripts need no space between
_BARE_RULE = re.compile(
    folded(
        rf"(?P<name>{_STRONG}|(?<![A-Za-z])(?:pwd|pw))(?P<gap>[ \t]{{0,2}})[\"'`(]?(?P<value>[!-~]{{5,64}})"
    ),
    re.IGNORECASE,
)
_WEAK_RULE = re.compile(
    folded(rf"(?:(?<![A-Za-z])|(?<=[a-z])(?=[A-Z]))(?i:(?:(?P<short>{_SHORT})|{_WEAK}){_BETWEEN}{_VALUE})")
)
_FLAGS = re.compile(
    r"--(?:password|passwd|pass|pwd|token|secret|api-?key)[ =][\"']?(?P<value>[^\s\"'-][^\s\"']{3,200})"
)
_CODE_NAME = r"(?<![A-Za-z])(?:pin(?:[ -]?(?:code|nummer|number))?|cvv2?|cvc2?|cvn)(?![A-Za-z])"
_SHORT_CODES = re.compile(
    rf"{_CODE_NAME}[\"' ]{{0,3}}(?:(?:is|ist|=|:|:=|是)?[\"' ]{{1,4}}|[=:])[0-9]{{3,8}}(?![0-9A-Za-z.])",
    re.IGNORECASE,
)
_IN_URL = re.compile(r"(?<=[a-z0-9])://[^\s/:@\"'<>]{0,64}:(?P<value>[^\s/@\"'<>]{1,128})@", re.IGNORECASE)
_USER_OPTION = re.compile(r"(?:^|\s)(?:-u|--user)[ =][\"']?[^\s:\"']{1,64}:(?P<value>[^\s\"']{3,128})")
_IDENTIFIED = re.compile(r"identified by [\"'](?P<value>[^\"'\n]{1,128})[\"']", re.IGNORECASE)

#: values that are no secrets: types, placeholders, and what sentences go on with
_NO_SECRETS = frozenset(
    folded(
        "str string text char varchar nvarchar int integer bool boolean bytes any object array "
        "optional required none null nil true false undefined void float number date password passwd "
        "pass pwd passwort token secret key user username login email name value input output field "
        "example sample test demo placeholder default changeme your yours my mine the a an and or not "
        "no yes in on at of for from with without to as it its wrong incorrect correct invalid valid "
        "expired empty missing weak strong secure insecure safe unsafe stored hashed encrypted reset "
        "lost forgotten needed changed set unset hidden visible stolen leaked compromised protected "
        "too so very always never only also still now being been used short long longer shorter "
        "better good bad simple complex easy hard important sensitive private public confidential "
        "what when where why how which that this there must should can could will would may might "
        "falsch richtig ungültig abgelaufen leer sicher unsicher nicht zu ein eine der die das und "
        "oder mein dein incorrecto incorrecta correcto seguro válida un una el la le les oublié trop "
        "pas manager managers policy policies hash hashing fields generator strength protection reuse "
        "redacted removed masked omitted unknown tbd todo 什么 "
        "多少 错误 不对 正确 安全 自己 неверный правильный"
    ).split()
)
_PLACEHOLDER = re.compile(
    r"\A(?:[\x00<{\[(]|[*x.•_#?…-]+\Z|\$[A-Za-z_{(]|\$\$|%[(sd]|your|(?:my|the|some|insert|enter)[ _-]"
    r"|replace[ _-]|change[ _-]?(?:me|it|this)|example|process\.env|os\.environ|env[.(\[:]|getenv|config[.\[]"
    r"|self\.|this\.|args\.|settings\.|request\.|req\.|user\.|data\.|vault:|ref\+|secretkeyref|!(?:vault|ref|sub|env))",
    re.IGNORECASE,
)
_CODE = re.compile(r"\A[A-Za-z_][A-Za-z0-9_.]*(?:\(|\[|\?\.|=>)|\A[a-z_]+\.[a-z_.]+\Z|\A[A-Za-z]+[|<]")
_TRAILING = ".,;:!?)]}>'\"`\\。，；！？、）」<*_|"
_SENTENCE_WORDS = ("is", "was", "ist", "lautet", "est", "es", "e", "to", "by")


def has_secret_key(text: str) -> bool:
    """Whether a folded text holds a private key, or a token of a known shape."""
    if _LONG_WORD.search(text) and _TOKEN.search(text):
        return True
    return _mentions(text, _ANYWHERE_HINTS) and _ANYWHERE.search(text) is not None


def has_password(text: str) -> bool:
    """Whether a folded text holds a password or a key after its name, or within a URL."""
    if _mentions(text, _STRONG_HINTS) and any(_is_strong(match) for match in _STRONG_RULE.finditer(text)):
        return True
    if _mentions(text, (*_STRONG_HINTS, "pw")) and _has_bare_password(text):
        return True
    if _mentions(text, _WEAK_HINTS) and any(_is_weak(match) for match in _WEAK_RULE.finditer(text)):
        return True
    if "://" in text and any(_is_value(match["value"]) for match in _IN_URL.finditer(text)):
        return True
    if "-" in text:
        if any(_is_value(match["value"]) for match in _FLAGS.finditer(text)):
            return True
        users = (match["value"] for match in _USER_OPTION.finditer(text))
        if any(_is_value(value) and not value.isdecimal() for value in users):
            return True
    if _mentions(text, ("pin", "cv")) and _SHORT_CODES.search(text):
        return True
    return _mentions(text, ("identified by",)) and any(
        _is_value(match["value"]) for match in _IDENTIFIED.finditer(text)
    )


def _has_bare_password(text: str) -> bool:
    if any(_is_value(match["value"]) and _is_random(match["value"]) for match in _OWNED_RULE.finditer(text)):
        return True
    for match in _BARE_RULE.finditer(text):
        value = match["value"].rstrip(_TRAILING)
        if not match["gap"] and match["name"].isascii():
            continue
        if len(value) < 5 or not _is_value(value) or _STANDARD.fullmatch(value):
            continue
        if _is_random(value) or (not match["name"].isascii() and value.isdecimal()):
            return True
    return False


def _mentions(text: str, hints: tuple[str, ...]) -> bool:
    """Whether one of these words is there at all: far sooner said than where."""
    lowered = text.lower()
    return any(hint in lowered for hint in hints)


def _is_strong(match: re.Match[str]) -> bool:
    """Whether what follows a password's name is a password: not a type, not a sentence that goes on."""
    value, by = _value(match), match["by"].lower()
    if not _is_value(value) or (by == "==" and not match["quote"]):
        return False
    if by == ">":
        return "</" in match["value"] + match["after"]
    if by in ("(", ",", "|", "to", "by", "->"):
        # lists, tables and calls hold other things as well
        return _is_mixed(value)
    if not match["quote"] and by == "=" and (match["after"].startswith(" =") or _NAME.fullmatch(value)):
        # code that hands it on
        return False
    if match["quote"] or by in ("=", ":=", "=>"):
        return len(value) >= 3
    if _is_mixed(value) and len(value) >= 3:
        return True
    # one plain word: a password if nothing follows it
    ends = len(value) < len(match["value"]) or not match["after"].strip()
    newline = "\n" in match[0][: match.start("value") - match.start()]
    return ends and not newline and len(value) >= 4


def _is_weak(match: re.Match[str]) -> bool:
    """Whether what follows a name that other things have too looks drawn at random."""
    value, by = _value(match), match["by"].lower()
    if not _is_value(value) or by in ("(", ",", "|", "to", "by", "->", ">"):
        return False
    if match["short"]:
        return _is_mixed(value) and len(value) >= 4
    if by.rstrip(" :") in _SENTENCE_WORDS and not _is_random(value):
        return False
    # SECRET=…, as environments have it
    name = match[0][: match.start("by") - match.start()]
    is_variable = by == "=" and name.isupper() and not name[-1].isspace()
    if match["quote"] or is_variable:
        return len(value) >= 6 and (
            _is_random(value) or _is_mixed(value) or (is_variable and len(value) >= 8)
        )
    return len(value) >= 8 and _is_random(value)


def _value(match: re.Match[str]) -> str:
    """The value without what ends it: up to its quote, a tag or the sentence's end."""
    value, quote = match["value"], match["quote"]
    if quote and value[0] in ",;:)]}":
        # the quote ends the name's own text: `'password: ', …`
        return ""
    if quote:
        # a phrase in quotes is one value
        value = re.split(r"[\\\"'`\n]", value + match["after"], maxsplit=1)[0]
    if match["by"] == ">":
        value = value.partition("<")[0]
    return value.rstrip(_TRAILING)


def _is_value(value: str) -> bool:
    value = value.rstrip(_TRAILING)
    lowered = value.lower()
    return (
        bool(value)
        and lowered not in _NO_SECRETS
        and not _PLACEHOLDER.search(value)
        and not _CODE.search(value)
    )


def _is_mixed(value: str) -> bool:
    """Whether a value has a digit, or a sign among its letters, as words do not."""
    return any(c.isdigit() for c in value) or any(not c.isalnum() and c not in "-'’./" for c in value)


_NAME = re.compile(r"[A-Za-z]+_[A-Za-z_]+")
#: names of methods that look drawn at random
_STANDARD = re.compile(
    r"(?:sha|md|aes|rsa|utf|base|ed|argon|oauth|pbkdf|x|hs|rs|es|ntlm|http|tls|ssl|win|windows|php|python|web|top|ipv)"
    r"-?v?[0-9][0-9a-z./_-]{0,12}|[0-9]+[a-z]{1,6}|[0-9]+-[a-z]+(?:-[a-z]+)*",
    re.IGNORECASE,
)


def _is_random(value: str) -> bool:
    return any(c.isdigit() for c in value) and sum(c.isalpha() for c in value) >= 2
