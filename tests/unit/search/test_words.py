"""Words in scripts with and without spaces, and the passages that BM25 finds with them."""

import pytest

from a2tgpo.search.bm25 import Bm25Index
from a2tgpo.search.passage import Passage
from a2tgpo.search.words import words_of


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The Café of São_Paulo, 2nd", ["the", "cafe", "of", "sao_paulo", "2nd"]),
        ("Straße Łódź Ёлка", ["strasse", "łodz", "елка"]),
        ("東京は日本の首都です。", ["東京", "京は", "は日", "日本", "本の", "の首", "首都", "都で", "です"]),
        ("山", ["山"]),
        ("iPhone手机15", ["iphone", "手机", "15"]),
        ("パリ", ["パリ"]),
        ("ﾊﾟﾘ", ["パリ"]),  # half-width characters
        ("スーパー", ["スー", "ーパ", "パー"]),
        ("파리는", ["파리", "리는"]),
        ("กรุงเทพ", ["กรุ", "รุง", "งเ", "เท", "ทพ"]),
        ("हिन्दी भाषा", ["हिन्दी", "भाषा"]),
        ("مُحَمَّد", ["محمد"]),
        ("שָׁלוֹם", ["שלום"]),
        ("👍🏽 ❤️", []),
    ],
)
def test_words_of(text, words):
    assert words_of(text) == words


FACTS = [
    Passage("paris", "パリ", "パリはフランスの首都である。"),
    Passage("bali", "バリ島", "バリ島はインドネシアの島である。"),
    Passage("beijing", "北京", "北京是中华人民共和国的首都。"),
    Passage("bangkok", "กรุงเทพมหานคร", "กรุงเทพมหานครเป็นเมืองหลวงของประเทศไทย"),
    Passage("delhi", "दिल्ली", "दिल्ली भारत की राजधानी है।"),
    Passage("seoul", "서울", "서울은 대한민국의 수도이다."),
]


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ("フランスの首都", "paris"),
        ("パリ", "paris"),
        ("バリ", "bali"),
        ("中国首都北京", "beijing"),
        ("เมืองหลวงของไทย", "bangkok"),
        ("भारत की राजधानी", "delhi"),
        ("대한민국 수도", "seoul"),
    ],
)
def test_a_question_finds_its_passage_in_its_own_script(query, found):
    hits = Bm25Index(FACTS).search(query, 6)
    assert hits[0][0].id == found
    assert len(hits) == 1 or hits[0][1] > hits[1][1]
