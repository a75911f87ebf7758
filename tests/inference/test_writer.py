"""Texts are pure functions of weights, prompt, options and sample."""

from __future__ import annotations

import numpy as np
import pytest

from cllm_spheres.errors import InputError, NonFinite
from cllm_spheres.inference.choice import log_softmax
from cllm_spheres.inference.many import write_all
from cllm_spheres.inference.options import Options, options_of
from cllm_spheres.inference.writer import COPIED_FROM, Writer
from cllm_spheres.text.tokenizer import StreamDecoder, WordTokenizer
from tests.inference.conftest import random_model

PROMPT = "the old"


def write(model, ids, options, sample=0, **how):
    """The pieces of one text written alone."""
    with model.writer(**how) as writer:
        writer.begin(ids, options, sample)
        return rest_of(writer)


def rest_of(writer):
    """All pieces until the last text has ended."""
    pieces = []
    while writer.busy:
        pieces += writer.step()
    return pieces


def text_of(pieces):
    return "".join(piece.text for piece in pieces)


def tokens_of(pieces):
    return [scored.token for piece in pieces for scored in piece.tokens]


def naive_tokens(model, ids, count, penalty=1.0):
    """The slow twin, greedy: all logits anew for each token; a window that is full goes on from its last half."""
    ids, start, written = list(ids), 0, []
    for _ in range(count):
        logits_V = model.logits(ids[start:])[-1].copy()
        for token in set(ids) if penalty != 1 else ():
            logits_V[token] = logits_V[token] / np.float32(penalty) if logits_V[token] > 0 else logits_V[token] * (
                np.float32(penalty)
            )  # fmt: skip
        token = int(np.argmax(logits_V))
        if token == model.tokenizer.eot:
            break
        written.append(token)
        ids.append(token)
        if len(ids) - start > model.shape.block_size:
            start = len(ids) - max(1, model.shape.block_size // 2)
    return written


# ---- greedy, exactly


@pytest.mark.parametrize("block_size", [1, 2, 9, 24])
@pytest.mark.parametrize("threads", [1, 2])
def test_greedy_tokens_are_those_of_the_uncached_pass(block_size, threads):
    model = random_model(block_size=block_size)
    model.parameters["wte.weight"][model.tokenizer.eot] *= 1e-3  # the end of text would be taken soon
    ids = model.encode("abcdefgh")[:block_size]
    pieces = write(model, ids, Options(tokens=4 * block_size + 9, temperature=0), threads=threads)
    assert tokens_of(pieces) == naive_tokens(model, ids, 4 * block_size + 9)
    assert len(tokens_of(pieces)) > block_size


def test_a_repetition_penalty_changes_what_is_there_already(model):
    ids = model.encode(PROMPT)
    plain = tokens_of(write(model, ids, Options(tokens=20, temperature=0)))
    for penalty in (0.5, 1.7, 5.0):
        options = Options(tokens=20, temperature=0, repetition_penalty=penalty)
        found = tokens_of(write(model, ids, options))
        assert found == naive_tokens(model, ids, 20, penalty) and found != plain


# ---- the same text, whatever is beside it


def different_options():
    return [
        Options(tokens=40, seed=1), Options(tokens=9, temperature=0), Options(tokens=33, temperature=1.3, top_k=5),
        Options(tokens=60, seed=2**63 - 1, top_p=0.7), Options(tokens=25, min_p=0.2, repetition_penalty=1.2),
    ]  # fmt: skip


def test_a_text_does_not_depend_on_its_batch_nor_on_threads(model):
    prompts = [model.encode(text) for text in ("the", "the old man", "Z", "the old man and the sea")]
    wanted = [(ids, options, sample) for ids in prompts for options in different_options() for sample in (0, 3)]
    alone = [text_of(write(model, *one)) for one in wanted]
    assert len(set(alone)) > len(wanted) * 0.7
    for slots, threads, together in ((4, 2, 4), (7, 1, 2), (len(wanted), 3, 5)):
        with model.writer(slots, threads=threads) as writer:
            waiting, going, texts = list(enumerate(wanted)), {}, [""] * len(wanted)
            while waiting or writer.busy:
                for number, one in waiting[-together:][: writer.free]:  # some now, others later
                    going[writer.begin(*one)] = number
                    waiting.remove((number, one))
                for piece in writer.step():
                    texts[going[piece.text_id]] += piece.text
            assert texts == alone


def test_a_slot_that_holds_the_beginning_of_a_prompt_is_used_and_changes_nothing(model, monkeypatch):
    monkeypatch.setattr("cllm_spheres.inference.writer.COPIED_FROM", 3)
    long, options = model.encode("the old man and the"), Options(tokens=12, seed=5)
    wanted = [(long, options, 0), (long, options, 1), (long[:9], options, 0), (long[:12], options, 2)]
    expected = [text_of(write(model, *one)) for one in wanted]
    computed = []
    with model.writer(3) as writer:
        run = writer._decoder.run
        monkeypatch.setattr(
            writer._decoder, "run", lambda rows: computed.append(sum(len(r.ids) for r in rows)) or run(rows)
        )
        texts = {writer.begin(*wanted[0]): ""}
        pieces = writer.step()
        texts |= {writer.begin(*one): "" for one in wanted[1:3]}
        pieces += writer.step()
        assert computed == [len(long), 3]  # a token each: what two of them share with the first was copied
        pieces += rest_of(writer)
        texts[writer.begin(*wanted[3])] = ""
        pieces += writer.step()
        assert computed[-1] == 3  # a slot that has become free holds the first 9 of its 12 tokens
        for piece in pieces + rest_of(writer):
            texts[piece.text_id] += piece.text
    assert list(texts.values()) == expected and COPIED_FROM > 3


def test_samples_and_seeds_differ_and_repeat(model):
    ids = model.encode(PROMPT)
    texts = [text_of(write(model, ids, Options(tokens=30, seed=seed), sample)) for seed in (1, 2) for sample in (0, 1)]
    assert len(set(texts)) == 4
    assert texts == [
        text_of(write(model, ids, Options(tokens=30, seed=seed), sample)) for seed in (1, 2) for sample in (0, 1)
    ]


def test_a_model_that_only_writes_takes_no_memory_for_gradients():
    fresh = random_model()
    fresh.generate("ab", tokens=3)
    assert not fresh._workspaces
    fresh.logits([1])
    assert fresh._workspaces.keys() == {"logits"}


def test_a_prompt_longer_than_a_pass_is_read_in_parts(monkeypatch):
    model = random_model(block_size=24)
    ids, options = model.encode("the old man and the sea"), Options(tokens=5, logprobs=3, score_prompt=True)
    expected = write(model, ids, options)
    monkeypatch.setattr("cllm_spheres.inference.rules.MOST_ROWS", 4)
    with model.writer(2) as writer:
        first, second = writer.begin(ids, options), writer.begin(ids[:2], options)
        pieces = rest_of(writer)
    assert next(p for p in pieces if p.text_id == first).prompt == expected[0].prompt
    assert text_of(p for p in pieces if p.text_id == first) == text_of(expected)
    assert text_of(p for p in pieces if p.text_id == second) == text_of(write(model, ids[:2], options))


# ---- how a text ends


def test_the_end_of_text_ends_it_and_is_not_shown():
    model = random_model(letters="ab")
    pieces = write(model, model.encode("a"), Options(tokens=500, seed=3))
    assert pieces[-1].ended == "stop" and pieces[-1].tokens == () and len(pieces) < 500
    assert set(text_of(pieces)) <= set("ab") and len(text_of(pieces)) == len(tokens_of(pieces))


def test_a_text_has_as_many_tokens_as_were_wanted(model):
    pieces = write(model, model.encode("a"), Options(tokens=11, seed=2))
    assert [piece.ended for piece in pieces] == [None] * 10 + ["length"] and len(tokens_of(pieces)) == 11


def test_a_stop_string_ends_a_text_before_it(model):
    ids = model.encode(PROMPT)
    whole = text_of(write(model, ids, Options(tokens=60, seed=4)))
    for first, length in ((0, 1), (7, 3), (20, 5), (50, 10)):
        stop = whole[first : first + length]
        pieces = write(model, ids, Options(tokens=60, seed=4, stop=("never there", stop)))
        assert text_of(pieces) == whole[: whole.index(stop)] and pieces[-1].ended == "stop"
    pieces = write(model, ids, Options(tokens=60, seed=4, stop=(whole[-3:] + "more",)))
    assert text_of(pieces) == whole and pieces[-1].ended == "length"  # what was held back is given out


def test_a_cancelled_text_makes_room(model):
    with model.writer(2) as writer:
        kept, given_up = (writer.begin(model.encode("a"), Options(tokens=9, seed=seed)) for seed in (1, 2))
        assert writer.free == 0
        writer.step()
        writer.cancel(given_up)
        writer.cancel(given_up)
        assert writer.free == 1
        pieces = rest_of(writer)
        assert {piece.text_id for piece in pieces} == {kept}
        text = text_of(pieces)
        assert writer.free == 2 and writer.step() == []
    assert text_of(write(model, model.encode("a"), Options(tokens=9, seed=1))).endswith(text)


# ---- log-probabilities


def test_logprobs_are_those_of_the_uncached_logits(model):
    ids = model.encode(PROMPT)
    pieces = write(model, ids, Options(tokens=6, temperature=0.7, logprobs=4, score_prompt=True, seed=9))
    all_ids = [*ids, *tokens_of(pieces)]
    logprobs = np.stack([log_softmax(row) for row in model.logits(all_ids)])
    prompt = pieces[0].prompt
    assert prompt[0].token == ids[0] and prompt[0].logprob is None and prompt[0].top == ()
    scored = [*prompt[1:], *(piece.tokens[0] for piece in pieces)]
    for one, row_V, token in zip(scored, logprobs, all_ids[1:], strict=False):
        # the logits agree to 1e-5 (they are equal on AVX-512)
        assert one.token == token and abs(one.logprob - row_V[token]) < 1e-4
        assert [i for i, _ in one.top] == list(np.argsort(-row_V, kind="stable")[:4])
        assert all(abs(value - row_V[i]) < 1e-4 for i, value in one.top)
    assert len(scored) == len(all_ids) - 1 and all(piece.prompt is None for piece in pieces[1:])


def test_a_prompt_can_be_scored_without_writing(model):
    (piece,) = write(model, model.encode(PROMPT), Options(tokens=0, score_prompt=True))
    assert piece.ended == "length" and piece.tokens == () and piece.text == "" and len(piece.prompt) == len(PROMPT)


# ---- what cannot be


@pytest.mark.parametrize(
    "ids, says",
    [
        ([], "The prompt has no tokens"),
        ([1] * 25, "The prompt has 25 tokens, and the model's block 24"),
        ([1, 54], "the token 54; the vocabulary is 0 to 53"),
        ([-1], "the token -1"),
        ([1, True], "the token True"),
        ([2**80], "the token 1208925819614629174706176"),
        (["a"], "the token 'a'"),
        ([1.0], "the token 1.0"),
    ],
)
def test_a_prompt_that_cannot_be_is_refused_with_the_numbers(model, ids, says):
    with model.writer() as writer:
        with pytest.raises(InputError, match=says):
            writer.begin(ids, Options())
        assert writer.free == 1


def test_damaged_weights_are_told():
    model = random_model()
    model.parameters["ln_f.weight"][0] = np.nan
    for temperature in (0, 1):
        with pytest.raises(NonFinite, match="not finite: its weights are damaged"):
            write(model, [1], Options(temperature=temperature))


@pytest.mark.parametrize(
    "wrong, says",
    [
        (dict(temperature=-1.0), "--temperature -1.0"),
        (dict(temperature=float("nan")), "--temperature nan"),
        (dict(temperature=10**400), "--temperature 1000"),
        (dict(top_k=0), "--top-k 0"),
        (dict(top_k=2.5), "--top-k 2.5"),
        (dict(top_p=0.0), "--top-p 0.0"),
        (dict(top_p=1.5), "--top-p 1.5"),
        (dict(min_p=-0.1), "--min-p -0.1"),
        (dict(min_p="x"), "--min-p 'x'"),
        (dict(repetition_penalty=0), "--repetition-penalty 0"),
        (dict(repetition_penalty=1e-300), "--repetition-penalty 1e-300 must be 0.01 to 100"),
        (dict(tokens=0), "--tokens 0 must be 1"),
        (dict(tokens=-1, score_prompt=True), "--tokens -1 must be 0"),
        (dict(tokens=-3, top_k=-2), "--top-k -2 .*\n--tokens -3"),
        (dict(seed=-1), "The seed is -1"),
        (dict(seed=2**63), "The seed is 9223372036854775808"),
        (dict(logprobs=101), "logprobs 101"),
        (dict(stop=""), "--stop takes"),
        (dict(stop=["a"] * 17), "--stop takes up to 16"),
        (dict(stop=[1]), "stop is "),
        (dict(stop=5), "stop is 5"),
        (dict(temprature=1), "no option 'temprature': did you mean 'temperature'"),
    ],
)
def test_options_that_cannot_work_are_named_with_their_numbers(wrong, says):
    with pytest.raises(InputError, match=says):
        options_of(wrong)


def test_options_that_work_pass():
    assert options_of(dict(stop="ab", top_k=None)) == Options(stop=("ab",))
    assert options_of(dict(temperature=0, top_p=1, min_p=1, tokens=1, stop=None)).stop == ()


# ---- many


def test_many_prompts_are_written_as_if_alone(model):
    prompts = [model.encode(text) for text in ("a", "bc", "the old")]
    with model.writer(2) as writer:
        texts = list(write_all(writer, prompts, Options(tokens=15), 2))
    assert sorted((one.prompt, one.sample) for one in texts) == [(p, s) for p in range(3) for s in range(2)]
    for one in texts:
        assert one.text == text_of(write(model, prompts[one.prompt], Options(tokens=15), one.sample))
        assert len(one.tokens) == 15 and one.ended == "length"


@pytest.mark.parametrize(
    ("prompts", "samples", "says"),
    [
        ("abc", 1, r"The prompts are 'abc': give a list of texts, such as \['abc'\]"),
        (["a", "x" * 25], 1, "Prompt 2 of 2: The prompt has 25 tokens, and the model's block 24"),
        (["a", "a?"], 1, "Prompt 2 of 2: The char vocabulary"),
        (["a", 3], 1, "Prompt 2 of 2: The prompt is 3: give a text"),
        (["a\ud83d"], 1, "is not Unicode: it holds half a surrogate pair"),
        (["a"], 0, "--samples 0 must be 1 or above"),
        (["a"], "2", "--samples '2' must be"),
    ],
)
def test_prompts_that_cannot_be_are_told_with_their_number(model, prompts, samples, says):
    with pytest.raises(InputError, match=says):
        list(model.generate_all(prompts, samples=samples))


def test_no_prompts_give_no_texts(model):
    assert list(model.generate_all([])) == []


def test_a_word_is_parted_from_the_prompt_by_a_space():
    tokenizer = WordTokenizer(["one", "two"])
    after = StreamDecoder(tokenizer, tokenizer.encode("one"))
    assert "one" + after.feed(1) + after.feed(0) == "one two one"
    assert StreamDecoder(tokenizer, [tokenizer.eot]).feed(1) == "two"


def test_a_writer_is_for_its_own_weights_as_they_were(model):
    one = random_model()
    writer = Writer(one)
    writer.begin([1], Options(tokens=3, temperature=0))
    for tensor in one.parameters.values():
        if tensor.ndim == 2 and len(tensor) not in (one.shape.vocab_size, one.shape.block_size):
            tensor[...] = 0  # its matrices are copies
    found = [token for _ in range(3) for token in tokens_of(writer.step())]
    assert found == tokens_of(write(random_model(), [1], Options(tokens=3, temperature=0)))
    writer.close()
