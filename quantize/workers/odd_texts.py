"""Texts that tokenizers are known to disagree on: what two of them are compared with."""

from __future__ import annotations

WORDS = (
    "The ferry crosses at the weir, and nobody knows since when.",
    " a space before, and one behind ",
    "two  spaces   three    four     five\n\nand\n\n\nlines\t\twith\ttabs \n \n end",
    "def f(x):\n    if x:\n        return {'a': [1, 2.5, -3e-7], \"b\": None}\n",
    "0 1 12 123 1234 12345 123456 1,000,000.00 3.14159 1/2 50% $9.99 2024-02-29T23:59:59Z",
    "I've, you're, he'd, they'll; IT'S NOT 'quoted' \"said\" ``code`` ...!!??",
    "naïve café Straße Ærøskøbing İstanbul Łódź e\u0301 ﬁ ½ ² Å",
    "Съешь же ещё этих мягких французских булок. Нещо на български.",
    "我想在苹果公司工作。東京の天気は？ 안녕하세요, 세계!",
    "مرحبا بالعالم שלום עולם नमस्ते दुनिया สวัสดีชาวโลก កាន់តែពិសេស",
    "😀 👩\u200d👩\u200d👧\u200d👦 🏳️\u200d🌈 🇩🇪 👍🏽 ✅ 🦙🦙 😶\u200d🌫️",
    "zero\u200bwidth no\u00a0break\u2003em \ufeffmark \u202eright",
    "https://example.org/a/b?c=d&e=%20f#g user@example.org C:\\Users\\x ~/.ssh #tag @name",
    "∑ᵢ xᵢ² ≤ ∞, ∀ε>0 ∃δ: |f(x)−L|<ε \\frac{a}{b} H₂O",
    "camelCaseAndSnake_case_AndSCREAMING_CASE kebab-case aaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "\r\nWindows\r\nlines\r\n",
    "<|im_start|> [INST] <s> </s> <unk> <0x0A> ▁ Ġ",
)
