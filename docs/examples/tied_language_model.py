"""Compress a causal language model whose output head is tied to its embedding; generate, train, reload."""

import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import embkern

CONFIG = LlamaConfig(
    vocab_size=8192,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    tie_word_embeddings=True,
)


def main() -> None:
    """Compress, generate, take a few steps of training, save, reload, and generate the same."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG).eval()
    counts = 1 / torch.arange(1, CONFIG.vocab_size + 1, dtype=torch.float64)  # without a tokenizer
    report = embkern.compress(model, ratio=8, counts=counts)
    print(f"{report.table_bytes:,} -> {report.compressed_bytes:,} bytes ({report.ratio:.2f}x)")
    for tier in report.tiers:
        print(f"  {tier.rows:5} rows at {tier.name}")
    print(model.model.embed_tokens)
    print(model.lm_head)

    batch = torch.randint(0, CONFIG.vocab_size, (4, 32))
    embkern.unfreeze_table(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)  # the codes are buffers and stay as they are
    losses = []
    for _ in range(5):
        loss = model(batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print("loss", " ".join(f"{loss:.3f}" for loss in losses))
    assert losses[-1] < losses[0]

    prompt = torch.tensor([[1, 17, 42]])
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        reloaded = LlamaForCausalLM.from_pretrained(folder).eval()
        again = LlamaForCausalLM.from_pretrained(folder).eval()
    first, second = (
        each.generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=0) for each in (reloaded, again)
    )
    print("generated", first.tolist())
    assert torch.equal(first, second)
    assert reloaded.lm_head.records is reloaded.model.embed_tokens.records


if __name__ == "__main__":
    main()
