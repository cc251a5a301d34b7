# ruff: noqa: RUF001 - Chinese and Arabic have punctuation of their own
"""Texts that a profile of prose does not know, made here: nothing of them was seen when thresholds were chosen."""

from __future__ import annotations

import base64
from itertools import count

import numpy as np

EMOJI = (
    "😀", "😂", "🥰", "😎", "🤖", "👻", "🐶", "🦊", "🌍", "🌋", "🍕", "🍉", "🚀", "🎉", "🎹", "⚽", "🔥", "💡", "📚", "🔒",
    "❤️", "👍🏽", "👩‍🚀", "🇫🇷", "✅",
)  # fmt: skip
CHINESE = (
    "清晨的雾气还没有散去，渔民已经把船推进了湖里。", "图书馆在河的另一边，要走过一座很旧的石桥才能到。",
    "老师说，这个问题没有简单的答案，需要大家一起讨论。", "昨天的火车晚点了两个小时，很多旅客在车站里睡着了。",
    "他把信读了三遍，然后小心地放回抽屉里。", "山上的茶树要到四月才会长出新的叶子。",
    "工程师们检查了桥梁的每一个部分，没有发现裂缝。", "晚饭以后，我们沿着海边散步，听见远处有人唱歌。",
    "市场里卖的苹果比上个月便宜了一半。", "如果明天下雨，比赛就会推迟到星期六。",
    "这本书讲的是一个年轻人离开家乡去寻找工作的故事。", "医生建议他多休息，少喝咖啡，每天早一点睡觉。",
    "新的地铁线路把机场和市中心连接起来，只需要二十五分钟。", "孩子们在院子里种了向日葵，等着夏天开花。",
)  # fmt: skip
ARABIC = (
    "خرج الصيادون إلى البحيرة قبل شروق الشمس وعادوا عند الظهر.", "تقع المكتبة على الجانب الآخر من النهر قرب الجسر القديم.",
    "قال المعلم إن هذا السؤال ليس له جواب بسيط ويحتاج إلى نقاش طويل.", "تأخر القطار ساعتين فنام كثير من المسافرين في المحطة.",
    "قرأ الرسالة ثلاث مرات ثم وضعها بعناية في الدرج.", "لا تنمو أوراق الشاي الجديدة على الجبل قبل شهر أبريل.",
    "فحص المهندسون كل جزء من الجسر ولم يجدوا أي شقوق.", "بعد العشاء مشينا على شاطئ البحر وسمعنا غناء من بعيد.",
    "سعر التفاح في السوق اليوم نصف ما كان عليه في الشهر الماضي.", "إذا أمطرت السماء غدا فستؤجل المباراة إلى يوم السبت.",
    "يحكي هذا الكتاب قصة شاب ترك قريته بحثا عن عمل في المدينة.", "نصحه الطبيب بأن يستريح وأن يقلل من القهوة وينام مبكرا.",
    "يربط الخط الجديد المطار بوسط المدينة في خمس وعشرين دقيقة.", "زرع الأطفال زهور دوار الشمس في الحديقة وانتظروا الصيف.",
)  # fmt: skip


def openings() -> dict[str, tuple[str, int]]:
    """By name: what a text that goes on in prose opens with, and how often its tokens are repeated."""
    return {
        "120 newlines, prose": ("\n", 120),
        "one word again and again": (" the", 536),
        "one letter again and again": ("a" * 4288, 1),
        "320 blank lines, prose": ("\n" * 320, 1),
    }


def texts() -> dict[str, str]:
    """By name: long texts that are all of one kind."""
    rng = np.random.default_rng(18)
    return {
        "base64": base64.b64encode(rng.bytes(6000)).decode(),
        "table of numbers": _table(rng),
        "emoji": "".join(rng.choice(EMOJI, 3000)),
        "Chinese": _shuffled(rng, CHINESE, ""),
        "Arabic": _shuffled(rng, ARABIC, " "),
        "code with long indents": _code(),
    }


def _shuffled(rng: np.random.Generator, sentences: tuple[str, ...], between: str) -> str:
    """Every sentence, again and again, in another order each time."""
    return between.join(sentences[i] for _ in range(8) for i in rng.permutation(len(sentences)))


def _table(rng: np.random.Generator) -> str:
    rows = [f"{day},{a:.3f},{b:.1f},{c}" for day, (a, b, c) in enumerate(zip(*_columns(rng)), 1)]
    return "\n".join(["day,pressure,temperature,visitors", *rows])


def _columns(rng: np.random.Generator) -> tuple:
    return 1000 + rng.normal(0, 9, 300).cumsum(), rng.normal(15, 6, 300), rng.integers(0, 90000, 300)


def _code() -> str:
    """Nested branches, whose lines begin with 24 to 60 spaces."""
    lines: list[str] = []
    for number in count():
        if len(lines) > 400:
            break
        indent = " " * (24 + 4 * (number % 10))
        lines += [
            f"{indent}if state.level[{number}] > limits.get('step_{number % 7}', {number * 3}):",
            f"{indent}    state.level[{number}] -= reserve(queue, {number % 5})",
            f"{indent}else:",
            f"{indent}    log.warning('level %d is below %d', {number}, state.floor)",
        ]
    return "\n".join(lines)
