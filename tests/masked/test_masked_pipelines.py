"""Tiny offline pipelines of diffusers with the masked scheduler swapped in, and back."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from diffusers import AmusedScheduler, BlockRefinementScheduler, LLaDA2Pipeline, UVit2DModel, VQModel

from diffsamp import masked
from diffsamp.errors import DiffsampError
from diffsamp.masked import MaskedScheduler

V, MASK = 20, 19


class LikesMask(torch.nn.Module):
    """A LLaDA2-shaped model whose largest logit is the mask."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.calls = 0

    @property
    def dtype(self):
        return torch.float32

    @property
    def device(self):
        return torch.device("cpu")

    def forward(self, ids, attention_mask=None, position_ids=None):
        self.calls += 1
        logits = torch.randn(*ids.shape, V, generator=torch.Generator().manual_seed(1)) * 2
        logits[..., MASK] = 25.0
        return SimpleNamespace(logits=logits)


def run_llada2(pipe, **options):
    return pipe(
        input_ids=torch.tensor([[1, 2, 3], [4, 5, 6]]),
        gen_length=13,
        block_length=8,
        num_inference_steps=4,
        temperature=1.0,
        mask_token_id=MASK,
        output_type="seq",
        eos_early_stop=False,
        threshold=2.0,
        editing_threshold=None,
        generator=torch.Generator().manual_seed(0),
        **options,
    ).sequences


def test_llada2_never_answers_with_the_mask_and_swaps_back():
    model = LikesMask()
    pipe = LLaDA2Pipeline(model=model, scheduler=BlockRefinementScheduler(), tokenizer=None)
    pipe.set_progress_bar_config(disable=True)
    stock = pipe.scheduler
    before = run_llada2(pipe)
    assert int((before == MASK).sum()) > 0  # the stock scheduler draws it
    pipe.scheduler = MaskedScheduler.from_pipe(pipe)
    seen, model.calls = [], 0
    after = run_llada2(pipe, callback_on_step_end=lambda p, i, t, k: seen.append(k["block_x"].clone()) or {})
    assert int((after == MASK).sum()) == 0 and int(after.max()) < V
    assert len(seen) == model.calls == 8  # two blocks of four steps
    assert all(torch.equal(x[:, :3], torch.tensor([[1, 2, 3], [4, 5, 6]])) for x in seen)
    pipe.scheduler = stock
    assert torch.equal(run_llada2(pipe), before)


@pytest.fixture(scope="module")
def amused():
    from diffusers import AmusedPipeline
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    torch.manual_seed(0)
    transformer = UVit2DModel(
        hidden_size=8, use_bias=False, hidden_dropout=0.0, cond_embed_dim=8, micro_cond_encode_dim=2,
        micro_cond_embed_dim=10, encoder_hidden_size=8, vocab_size=32, codebook_size=32, in_channels=8,
        block_out_channels=8, num_res_blocks=1, downsample=True, upsample=True, block_num_heads=1, num_hidden_layers=1,
        num_attention_heads=1, attention_dropout=0.0, intermediate_size=8, layer_norm_eps=1e-6,
        ln_elementwise_affine=True,
    )  # fmt: skip
    vqvae = VQModel(act_fn="silu", block_out_channels=[8], down_block_types=["DownEncoderBlock2D"], in_channels=3,
                    latent_channels=8, layers_per_block=1, norm_num_groups=8, num_vq_embeddings=32, out_channels=3,
                    sample_size=8, up_block_types=["UpDecoderBlock2D"], mid_block_add_attention=False,
                    lookup_from_codebook=True)  # fmt: skip
    text = CLIPTextModelWithProjection(
        CLIPTextConfig(
            hidden_size=8,
            intermediate_size=8,
            num_attention_heads=1,
            num_hidden_layers=1,
            vocab_size=100,
            projection_dim=8,
        )
    )
    pipe = AmusedPipeline(vqvae, None, text, transformer, AmusedScheduler(mask_token_id=31))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run_amused(pipe, steps=5, **options):
    return pipe(
        prompt_embeds=torch.ones(1, 8),
        encoder_hidden_states=torch.ones(1, 5, 8),
        height=8,
        width=8,
        negative_prompt_embeds=torch.zeros(1, 8),
        negative_encoder_hidden_states=torch.zeros(1, 5, 8),
        num_inference_steps=steps,
        guidance_scale=3.0,
        output_type="latent",
        generator=torch.Generator().manual_seed(0),
        **options,
    ).images


@pytest.mark.parametrize("counting", ["even", "cosine"])
def test_amused_reveals_everything_in_the_steps_it_was_given(amused, counting):
    stock = amused.scheduler
    before = run_amused(amused)
    amused.scheduler = MaskedScheduler.from_pipe(amused, counting=counting)
    left = []
    latents = run_amused(amused, callback=lambda i, t, x: left.append(int((x == 31).sum())), callback_steps=1)
    total = latents.numel()
    assert left[-1] == 0 and len(left) == 5 and left == sorted(left, reverse=True) and len({*left}) == 5
    assert latents.shape == before.shape and int(latents.max()) < 31
    if counting == "even":
        assert left == [total - -(-total * (i + 1) // 5) for i in range(5)] or max(left) - left[0] == 0
    amused.scheduler = stock
    assert torch.equal(run_amused(amused), before)


def test_vq_diffusion_pipeline_with_class_first_log_probabilities():
    from diffusers import VQDiffusionPipeline, VQDiffusionScheduler

    classes, tokens = 10, 16

    class Transformer(torch.nn.Module):
        num_latent_pixels, num_vector_embeds, height, width = tokens, classes, 4, 4

        def forward(self, x, encoder_hidden_states, timestep):
            assert 0 <= int(timestep) < 100 and x.max() < classes
            logits = torch.randn(x.shape[0], classes - 1, tokens, generator=torch.Generator().manual_seed(2))
            return SimpleNamespace(sample=logits.log_softmax(1))

    # The pipeline's own loop, with its text encoder and its decoder replaced by stand-ins.
    class Tiny(VQDiffusionPipeline):
        device = torch.device("cpu")

        def __init__(self, scheduler):
            object.__setattr__(self, "scheduler", scheduler)
            object.__setattr__(self, "transformer", Transformer())
            quantize = SimpleNamespace(get_codebook_entry=self._entry)
            vqvae = SimpleNamespace(config=SimpleNamespace(vq_embed_dim=3), quantize=quantize, decode=self._decode)
            object.__setattr__(self, "vqvae", vqvae)
            self._progress_bar_config = {"disable": True}

        def _entry(self, sample, shape):
            object.__setattr__(self, "tokens", sample)
            return torch.zeros(shape).permute(0, 3, 1, 2)

        def _decode(self, latents, force_not_quantize):
            return SimpleNamespace(sample=latents)

        def _encode_prompt(self, *args):
            return torch.zeros(2, 1, 4)

    pipe = Tiny(VQDiffusionScheduler(num_vec_classes=classes))
    stock = pipe.scheduler
    object.__setattr__(pipe, "scheduler", MaskedScheduler.from_pipe(pipe))
    left = []
    pipe(
        "x",
        num_inference_steps=6,
        guidance_scale=2.0,
        output_type="np",
        generator=torch.Generator().manual_seed(0),
        callback=lambda i, t, x: left.append(int((x == classes - 1).sum())),
    )
    assert left == [13, 10, 7, 4, 2, 0] and int(pipe.tokens.max()) < classes - 1
    object.__setattr__(pipe, "scheduler", stock)
    pipe("x", num_inference_steps=6, output_type="np", generator=torch.Generator().manual_seed(0))
    assert pipe.tokens.shape == (1, tokens)


def test_given_tokens_survive_and_draws_follow_the_logits():
    scheduler = MaskedScheduler(mask_token_id=MASK)
    scheduler.set_timesteps(3)
    x = torch.full((2, 9), MASK)
    x[0, :4] = 7
    logits = torch.full((2, 9, V), -1e4)
    logits[..., 5] = 0.0
    logits[..., MASK] = 50.0
    for t in scheduler.timesteps:
        x = scheduler.step(logits, t, x, generator=torch.Generator().manual_seed(0)).prev_sample
    assert x[0].tolist() == [7] * 4 + [5] * 5 and x[1].tolist() == [5] * 9
    rows = [torch.Generator().manual_seed(0), torch.Generator().manual_seed(1)]
    assert scheduler.step(logits, 0, torch.full((2, 9), MASK), generator=rows).prev_sample.eq(5).all()


def test_config_round_trip_and_refusals(tmp_path):
    scheduler = MaskedScheduler(mask_token_id=5, order_rule="entropy", temperature=0.7)
    scheduler.save_config(tmp_path)
    again = MaskedScheduler.from_config(MaskedScheduler.load_config(tmp_path))
    assert again.config.order_rule == "entropy" and again.config.temperature == 0.7 and again.config.mask_token_id == 5
    uniform = SimpleNamespace(scheduler=SimpleNamespace(config={}))
    with pytest.raises(DiffsampError, match="DiffusionGemmaPipeline cannot"):
        MaskedScheduler.from_pipe(type("DiffusionGemmaPipeline", (), {"scheduler": uniform.scheduler})())
    with pytest.raises(DiffsampError, match="mask_token_id is missing"):
        MaskedScheduler().step(torch.zeros(1, 2, V), 0, torch.zeros(1, 2, dtype=torch.int64))
    with pytest.raises(DiffsampError, match="does not fit"):
        scheduler.step(torch.zeros(1, 3, V), 0, torch.full((1, 2), 5))
    with pytest.raises(DiffsampError, match="order_rule='best'"):
        MaskedScheduler(order_rule="best")
    noisy = MaskedScheduler(mask_token_id=MASK)
    noisy.set_timesteps(10)
    clean = torch.zeros(1, 4000, dtype=torch.int64)
    share = noisy.add_noise(clean, 2, torch.Generator().manual_seed(0)).eq(MASK).float().mean()
    assert abs(float(share) - 0.3) < 0.04
    assert masked.MaskedScheduler is MaskedScheduler
