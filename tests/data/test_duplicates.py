"""Near duplicates against all pairs, compared one by one."""

import random
import time
from itertools import combinations

from minilora.data.duplicates import NEAR, groups_of_equal, near_pairs


def words(n: int, draw: random.Random) -> list[str]:
    return ["".join(draw.choices("abcdefghijklmnop", k=draw.randint(2, 9))) for _ in range(n)]


def similarity(a: str, b: str) -> float:
    """The Jaccard index of the runs of five characters, by Python's sets."""
    x, y = ({text[i : i + 5] for i in range(len(text) - 4)} for text in (a, b))
    return len(x & y) / len(x | y)


def test_the_pairs_are_those_of_the_definition() -> None:
    draw, texts = random.Random(0), list[str]()
    for _ in range(30):
        text = words(40, draw)
        texts.append(" ".join(text))
        for changes in (1, 3, 8):
            changed = text.copy()
            for _ in range(changes):
                changed[draw.randrange(40)] = "zzzz"
            texts.append(" ".join(changed))
    all_near = [pair for pair in combinations(range(len(texts)), 2) if similarity(*(texts[i] for i in pair)) >= NEAR]
    assert 30 < len(all_near) < 150
    found = near_pairs(texts)
    assert set(found) <= set(all_near), "no pair without its real similarity"
    assert sorted(j for _, j in found) == sorted({j for _, j in all_near}), "and none is missed, or told twice"


def test_of_two_sides_each_that_is_learnt_is_held_against_the_other() -> None:
    draw = random.Random(0)
    texts = [words(40, draw) for _ in range(3)] * 4
    near = [" ".join([*text[:-1], str(n)]) for n, text in enumerate(texts)]  # 0, 3, 6, 9 are near, and so on
    within = [(i, i + 3) for i in range(6)]
    across = [(i, 9 + i % 3) for i in range(9)]
    assert sorted(near_pairs(near, 9)) == sorted([(i % 3, j) for i, j in within] + across)


def test_short_and_foreign_texts() -> None:
    texts = [
        "",
        "a",
        "ab",
        "你好，请介绍一下北京的历史和文化，谢谢你。",
        "你好，请介绍一下北京的历史和文化，谢谢您。",
        "另一个问题",
    ]
    assert near_pairs(texts) == []
    longer = "你好，请介绍一下北京的历史和文化，还有美食、建筑和交通，最后说说什么季节去最好，谢谢"
    assert near_pairs([longer + "你", "x", longer + "您"]) == [(0, 2)]
    assert near_pairs([]) == []


def test_many_of_one_template_take_no_time_that_grows_with_their_square() -> None:
    template = "Please translate the following English sentence into French, and mind the tone of the original: "
    texts = [f"{template}{n}" for n in range(4000)]
    began = time.process_time()
    pairs = near_pairs(texts)
    assert len(pairs) == 3999
    assert time.process_time() - began < 10, "eight million comparisons would take minutes"


def test_equal_keys() -> None:
    assert groups_of_equal("abcab") == [[0, 3], [1, 4], [2]]
