"""Prompts, lengths, batches, guidance, blocks, wrappers, and errors of the masked samplers."""

from __future__ import annotations

import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from diffsamp import masked
from diffsamp.errors import DiffsampError
from diffsamp.masked.denoisers import accepts

V, MASK = 12, 11
SAMPLERS = [
    masked.FirstHitting(),
    masked.FirstHitting(tokens_per_step=3),
    masked.FirstHitting(steps=4),
    masked.FirstHitting(tokens_per_step=2, extrapolate=True),
    masked.CountFirst(5),
    masked.CountFirst(64),
]


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    torch.set_num_threads(1)


class Net(torch.nn.Module):
    """A small network of both neighbours and the time, that would love to answer with the mask."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = torch.randn(V, V, generator=generator, dtype=torch.float64)
        self.calls = 0

    def forward(self, x, t):
        self.calls += 1
        x = x.clamp_min(0)
        logits = self.table[x.roll(1, 1)] + self.table[x.roll(-1, 1)].roll(1, -1) * (1 + t[:, None, None])
        logits[..., MASK] = 30.0
        return logits


@pytest.fixture
def net():
    return Net()


def canvas() -> torch.Tensor:
    x = torch.full((8, 16), MASK)
    for i in range(8):
        x[i, : 2 * i] = i
    x[7, :] = 3  # nothing to do
    x[2, 9:12] = 5  # a hole on either side
    return x


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
@pytest.mark.parametrize("order", ["random", "confidence", "entropy"])
def test_frozen_tokens_stay_and_no_mask_is_left(net, sampler, order):
    if getattr(sampler, "extrapolate", False) and order != "random":
        with pytest.raises(DiffsampError, match="extrapolate"):
            masked.sample(net, canvas(), mask_id=MASK, sampler=sampler, order=order, seeds=range(8))
        return
    x = canvas()
    y, facts = masked.sample(net, x, mask_id=MASK, sampler=sampler, order=order, seeds=range(8))
    assert torch.equal(y[x != MASK], x[x != MASK])
    assert not bool((y == MASK).any()) and int(y.max()) < V
    masks = (x == MASK).sum(1)
    assert facts["calls"] == net.calls <= int(masks.max())
    assert facts["revealed"].tolist() == masks.tolist()
    for row, order_ in enumerate(facts["order"]):
        assert sorted(i for i in order_.tolist() if i >= 0) == (x[row] == MASK).nonzero()[:, 0].tolist()


@pytest.mark.parametrize("order", [o for o in masked.ORDERS if o not in ("random",)])
def test_every_order_fills_everything(net, order):
    x = canvas()
    y, facts = masked.sample(
        net, x, mask_id=MASK, sampler=masked.FirstHitting(tokens_per_step=2), order=order, seeds=range(8)
    )
    assert torch.equal(y[x != MASK], x[x != MASK]) and not bool((y == MASK).any())
    assert facts["calls"] <= 16


@pytest.mark.parametrize("sampler", [*SAMPLERS, masked.ReMDM(6, "conf", 0.5), masked.P2(6)], ids=str)
def test_a_row_is_the_same_alone_and_in_a_batch(net, sampler):
    x = canvas()
    together, _ = masked.sample(net, x, mask_id=MASK, sampler=sampler, seeds=range(100, 108))
    for i in (0, 2, 5):
        alone, _ = masked.sample(net, x[i : i + 1], mask_id=MASK, sampler=sampler, seeds=[100 + i])
        assert torch.equal(alone[0], together[i])


def test_generators_one_for_all_or_one_a_row(net):
    x = canvas()
    mine = [torch.Generator().manual_seed(i) for i in range(8)]
    together, _ = masked.sample(net, x, mask_id=MASK, generator=mine)
    alone, _ = masked.sample(net, x[3:4], mask_id=MASK, generator=[torch.Generator().manual_seed(3)])
    assert torch.equal(alone[0], together[3])
    first, _ = masked.sample(net, x, mask_id=MASK, generator=torch.Generator().manual_seed(1))
    again, _ = masked.sample(net, x, mask_id=MASK, generator=torch.Generator().manual_seed(1))
    other, _ = masked.sample(net, x, mask_id=MASK, generator=torch.Generator().manual_seed(2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_nothing_masked_is_a_no_op_without_a_call(net):
    x = torch.full((3, 5), 2)
    for sampler in [*SAMPLERS, masked.ReMDM(4), masked.P2(4)]:
        y, facts = masked.sample(net, x, mask_id=MASK, sampler=sampler, seeds=range(3))
        assert torch.equal(x, y) and facts["calls"] == 0
    assert net.calls == 0


def test_rows_of_a_long_batch_keep_their_own_clocks():
    # B=8, L=1024, N=10,000: a shared clock would make about 5,600 calls.
    planned = masked.CountFirst(10_000).events(np.full(8, 1024), np.arange(8))
    assert planned.sizes.shape[1] <= 1.1 * 1024
    assert masked.FirstHitting().events(np.full(8, 1024), np.arange(8)).sizes.shape[1] == 1024


def test_step_by_step_is_the_same_as_sample_and_old_states_stay_valid(net):
    x = canvas()
    want, _ = masked.sample(net, x, mask_id=MASK, seeds=range(8))
    states = [masked.init(masked.FirstHitting(), x, mask_id=MASK, seeds=range(8))]
    while not states[-1].done:
        states.append(masked.step(states[-1], net))
    assert torch.equal(states[-1].x, want)
    replay = states[5]
    while not replay.done:
        replay = masked.step(replay, net)
    assert torch.equal(replay.x, want) and torch.equal(states[0].x, x)
    assert len(masked.info(replay)["entropy"]) == replay.calls


def test_positions_only_head_gives_the_same_tokens(net):
    asked = []

    def rows_only(x, t, positions=None):
        asked.append(tuple(positions.shape))
        return net(x, t).gather(1, positions[..., None].expand(-1, -1, V))

    x = canvas()
    want, _ = masked.sample(net, x, mask_id=MASK, seeds=range(8))
    got, _ = masked.sample(rows_only, x, mask_id=MASK, seeds=range(8))
    assert torch.equal(want, got) and all(shape[1] == 1 for shape in asked)


def test_arguments_of_a_denoiser_are_read_from_every_kind_of_callable():
    class Instance:
        def __call__(self, x, t, positions=None):
            return x

        def plain(self, x, t, **options):
            return x

    class Module(torch.nn.Module):
        def forward(self, x, t, positions=None):
            return x

    class Unhashable(Instance):
        __hash__ = None  # type: ignore[assignment]

    for _ in range(2):  # the second time from memory
        for takes in (Instance(), Module(), Unhashable(), partial(Instance(), t=0), lambda x, t, positions=None: x):
            assert accepts(takes, "positions") and not accepts(takes, "rows")
        assert not accepts(Instance().plain, "positions")  # a **kwargs would swallow it
        assert not accepts(lambda x, t: x, "positions")
    module = Module()
    module.forward = lambda x, t: x
    assert not accepts(module, "positions") and accepts(Module(), "positions")


def test_guidance_of_one_is_no_guidance_and_rate_is_untouched(net):
    x = torch.full((4, 10), MASK)
    x[:, :3] = torch.arange(3)
    prompt = x != MASK
    plain, facts = masked.sample(net, x, mask_id=MASK, seeds=range(4), sampler=masked.CountFirst(6))
    one = masked.ClassifierFreeGuidance(net, 1.0, prompt=prompt, mask_id=MASK)
    same, _ = masked.sample(one, x, mask_id=MASK, seeds=range(4), sampler=masked.CountFirst(6))
    assert torch.equal(plain, same)
    three = masked.ClassifierFreeGuidance(net, 3.0, prompt=prompt, mask_id=MASK)
    guided, strong = masked.sample(three, x, mask_id=MASK, seeds=range(4), sampler=masked.CountFirst(6))
    assert torch.equal(facts["step_of"], strong["step_of"])  # the same positions at the same calls
    assert not torch.equal(plain, guided)
    t, rows = torch.ones(4, dtype=torch.float64), torch.arange(4)
    c, u = net(x, t), net(x.masked_fill(prompt, MASK), t)
    llada = (u + (2.0 + 1) * (c - u)).log_softmax(-1)  # cfg_scale s = 2
    assert torch.allclose(three(x, t, None, rows).double(), llada, atol=1e-4)
    explicit = masked.ClassifierFreeGuidance(net, 3.0, unconditional=lambda x, t: u)
    assert torch.allclose(explicit(x, t), three(x, t), atol=1e-6)


def test_blocks_from_left_to_right_lengths_and_stop_tokens(net):
    seen = []
    out = masked.generate(
        net,
        [[1, 2], [3, 4, 5, 6, 7]],
        mask_id=MASK,
        new_tokens=[9, 6],
        block_length=3,
        seeds=[0, 1],
        callback=lambda s: seen.append(s.x.clone()),
    )
    assert [len(s) for s in out.sequences] == [11, 11]
    assert out.sequences[0][:2] == [1, 2] and out.sequences[1][:5] == [3, 4, 5, 6, 7]
    assert MASK not in out.tokens and out.calls == 9 and len(out.blocks) == 3
    second = [x for x in seen if bool((x[0, 2:5] != MASK).all())]
    assert all(torch.equal(x[0, 2:5], out.tokens[0, 2:5]) for x in second)  # earlier blocks are frozen
    stop = out.sequences[0][4]
    short = masked.generate(
        net, [[1, 2], [3, 4, 5, 6, 7]], mask_id=MASK, new_tokens=[9, 6], block_length=3, seeds=[0, 1], stop_ids=[stop]
    )
    first = out.sequences[0].index(stop, 2)
    assert short.sequences[0] == out.sequences[0][: first + 1]
    assert short.tokens[0, first + 1 :].eq(masked.PAD).all()
    nothing = masked.generate(net, [[1], [2]], mask_id=MASK, new_tokens=0)
    assert nothing.calls == 0 and nothing.sequences == [[1], [2]]


class TinyHF(torch.nn.Module):
    """The interface of a Hugging Face masked LM."""

    def __init__(self, shift: bool = False) -> None:
        super().__init__()
        self.shift, self.masks = shift, []

    def forward(self, input_ids, attention_mask=None, timesteps=None):
        self.masks.append(attention_mask)
        logits = torch.nn.functional.one_hot(torch.arange(input_ids.shape[1]) % (V - 1), V).float() * 60
        logits = logits.expand(len(input_ids), -1, -1)  # position i says i
        if self.shift:
            logits = torch.cat([logits[:, 1:], logits[:, -1:]], 1)  # row i predicts position i + 1
        return SimpleNamespace(logits=logits)


@pytest.mark.parametrize("shift", [False, True])
def test_hugging_face_masked_lm_with_and_without_shifted_logits(shift):
    x = torch.full((2, 9), MASK)
    x[:, 0] = 0
    x[1, 7:] = -1
    model = TinyHF(shift)
    y, _ = masked.sample(masked.MaskedLM(model, shift=shift, pad_id=-1), x, mask_id=MASK, seeds=[0, 1])
    assert y[0].tolist() == list(range(9)) and y[1].tolist() == [*range(7), -1, -1]
    assert model.masks[0][1].tolist() == [1] * 7 + [0] * 2


def test_transformers_masked_lm_and_kept_logits():
    from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {
        "vocab_size": V,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "max_position_embeddings": 32,
    }
    x = torch.full((1, 8), MASK)
    x[0, :2] = 1
    bert = masked.MaskedLM(BertForMaskedLM(BertConfig(**shape)).eval())
    y, _ = masked.sample(bert, x, mask_id=MASK, seeds=[0])
    assert MASK not in y and y[0, :2].tolist() == [1, 1]
    llama = LlamaForCausalLM(LlamaConfig(**shape)).eval()
    full = masked.MaskedLM(llama, shift=True)(x, torch.ones(1))
    wanted = torch.tensor([[3, 6]])
    kept = masked.MaskedLM(llama, shift=True)(x, torch.ones(1), positions=wanted)
    assert torch.allclose(kept, full[:, [3, 6]], atol=1e-5)
    wrong = masked.MaskedLM(llama, vocab_size=V + 1)
    with pytest.raises(DiffsampError, match="logits are 12 wide; the tokenizer has 13"):
        masked.sample(wrong, x, mask_id=MASK)


def test_output_head_of_a_hugging_face_model_runs_only_where_tokens_are_drawn():
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    bert = BertForMaskedLM(BertConfig(vocab_size=V, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                                      intermediate_size=16, max_position_embeddings=32)).eval()  # fmt: skip
    x = torch.full((3, 10), MASK)
    x[1, :4], x[2, 5:] = 2, 3
    options = {"mask_id": MASK, "seeds": [0, 1, 2], "sampler": masked.FirstHitting(tokens_per_step=2)}
    want, _ = masked.sample(lambda ids, t: bert(ids).logits, x, **options)
    model = masked.MaskedLM(bert)
    hooks = len(bert.get_output_embeddings()._forward_pre_hooks)
    got, facts = masked.sample(model, x, **options)
    assert torch.equal(got, want) and facts["calls"] == 5
    assert len(bert.get_output_embeddings()._forward_pre_hooks) == hooks  # nothing stays behind in the user's model
    cut = []
    linear = torch.nn.functional.linear

    def spy(given, weight, bias=None):
        if weight is bert.get_output_embeddings().weight:
            cut.append(given.shape[-2])
        return linear(given, weight, bias)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "linear", spy)
        again, _ = masked.sample(model, x, **options)
    assert torch.equal(again, want) and cut == [2] * 5


@pytest.mark.parametrize("kind", ["scores all positions", "normalises over positions", "counts on the length"])
def test_model_that_does_more_with_its_logits_keeps_its_whole_head(kind):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(1)
            self.embedding, self.head = torch.nn.Embedding(V, 8), torch.nn.Linear(8, V)

        def get_output_embeddings(self):
            return self.head

        def forward(self, ids):
            logits = self.head(self.embedding(ids) + self.embedding(ids.roll(1, 1)))
            if kind == "scores all positions":
                return torch.where((ids != MASK)[..., None], -9.0, logits)
            if kind == "counts on the length":
                logits[ids != MASK] = -9.0
                return logits
            return logits - 3 * logits.mean(1, keepdim=True)

    net, x = Model(), torch.full((2, 7), MASK)
    x[0, :2] = 1
    want, _ = masked.sample(lambda ids, t: net(ids), x, mask_id=MASK, seeds=[0, 1])
    got, _ = masked.sample(masked.MaskedLM(net), x, mask_id=MASK, seeds=[0, 1])
    assert torch.equal(got, want) and not net.head._forward_pre_hooks


def test_no_gradients_are_recorded_and_a_denoiser_may_turn_them_on():
    layer, recorded = torch.nn.Embedding(V, V), []

    def plain(x, t):
        logits = layer(x)
        recorded.append(logits.requires_grad)
        return logits

    def guided(x, t):
        with torch.enable_grad():
            logits = layer(x)
            (slope,) = torch.autograd.grad(logits.logsumexp(-1).sum(), logits)
        return logits.detach() + slope

    x = torch.full((12, 6), MASK)
    for order in ("random", "entropy", "low-confidence"):
        masked.sample(plain, x, mask_id=MASK, seeds=range(12), order=order)
        masked.sample(guided, x, mask_id=MASK, seeds=range(12), order=order)
    assert not any(recorded)


def nan_net(x, t):
    return torch.full((*x.shape, V), math.nan)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda n: masked.sample(n, canvas(), mask_id=None), "mask_id=None"),
        (lambda n: masked.sample(n, canvas().float(), mask_id=MASK), "int64"),
        (lambda n: masked.sample(n, canvas(), mask_id=MASK, temperature=-0.5), "temperature=-0.5"),
        (lambda n: masked.sample(n, canvas(), mask_id=MASK, order="best"), "order='best'"),
        (
            lambda n: masked.sample(n, canvas(), mask_id=MASK, sampler=masked.CountFirst(4), order="threshold"),
            "threshold",
        ),
        (lambda n: masked.sample(n, canvas(), mask_id=MASK, seeds=[1, 2]), "seeds must be 8"),
        (lambda n: masked.sample(nan_net, canvas(), mask_id=MASK), "NaN"),
        (lambda n: masked.sample(nan_net, canvas(), mask_id=MASK, order="entropy"), "NaN"),
        (lambda n: masked.sample(lambda x, t: n(x, t)[:, :3], canvas(), mask_id=MASK), "logits: the denoiser gave"),
        (lambda n: masked.sample(lambda x, t: n(x, t)[..., :3], canvas(), mask_id=MASK), "3 wide, but token 6"),
        (lambda n: masked.generate(n, [[1, MASK]], mask_id=MASK, new_tokens=2), "prompt 0 holds the mask"),
        (lambda n: masked.generate(n, [[1]], mask_id=None, new_tokens=2), "mask_id is missing"),
        (lambda n: masked.generate(n, [[1] * 9], mask_id=MASK, new_tokens=2, max_length=10), "exceed the model's 10"),
        (lambda n: masked.FirstHitting(tokens_per_step=0), "tokens_per_step=0"),
        (lambda n: masked.CountFirst(0), "steps=0"),
        (lambda n: masked.FirstHitting(schedule="cosin"), "schedule='cosin'"),
        (lambda n: masked.ReMDM(4, eta=2.0), "eta=2.0"),
        (lambda n: masked.ReMDM(4.5), "steps=4.5"),
        (lambda n: masked.P2(0), "steps=0"),
        (lambda n: masked.FirstHitting(tokens_per_step=2, steps=3), "tokens_per_step=2, steps=3: give one"),
        (lambda n: masked.sample(n, canvas(), mask_id=MASK, seeds=0), "seeds must be 8 integers"),
        (lambda n: masked.sample(n, canvas(), mask_id=MASK, generator=5), "generator=5 must be a torch.Generator"),
        (lambda n: masked.sample(n, canvas(), mask_id=MASK, sampler=masked.P2(4), order="entropy"), "P2 chooses the"),
        (lambda n: masked.sample(n, canvas(), mask_id=MASK, sampler=masked.FirstHitting), "must be a sampler"),
        (lambda n: masked.sample(n, canvas(), mask_id=MASK, temperature=None), "temperature=None"),
        (lambda n: masked.sample(n, canvas(), mask_id=MASK, top_k=2.5), "top_k=2.5"),
        (lambda n: masked.generate(n, "text", mask_id=MASK, new_tokens=2), "lists of token ids"),
        (lambda n: masked.generate(n, [[1]], mask_id=MASK, new_tokens=2.5), "new_tokens=2.5"),
        (
            lambda n: masked.generate(masked.MaskedLM(TinyHF()), [[1, 2], [1]], mask_id=MASK, new_tokens=2),
            r"pad_id=-1",
        ),
        (
            lambda n: masked.sample(
                masked.ClassifierFreeGuidance(n, 2.0, prompt=canvas()[:1] != MASK, mask_id=MASK), canvas(), mask_id=MASK
            ),
            r"prompt is \(1, 16\)",
        ),
        (lambda n: masked.ClassifierFreeGuidance(n, 2.0), "guidance needs"),
    ],
)
def test_bad_input_is_one_clear_line(net, call, text):
    with pytest.raises(DiffsampError, match=text) as caught:
        call(net)
    assert "\n" not in str(caught.value)
