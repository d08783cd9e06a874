# %% [markdown]
# # Sequences
#
# Many of today's language models have a short causal convolution over time in each block. Here a small gated recurrent
# model learns Python's own reference manual, byte by byte, with many documents in a row. The notebook shows what leaks
# between documents if the model is not reset at their borders, that decoding one token at a time gives the same numbers
# as the whole text, and how speculative decoding takes tokens back.
#
# It needs `pip install '.[notebooks]'` in a clone. The text ships with Python.

# %%
import pydoc_data.topics
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

from depthwise_jax import CausalDepthwiseConv1D, causal_conv1d_state

plt.style.use("depthwise_jax.mplstyle")

# %% [markdown]
# ## Many documents in a row
#
# Each paragraph of the manual is a document. Paragraphs are laid end to end and cut into rows of 512 bytes. The model
# needs each byte's position in its own document, `segment_pos`: the first byte of each document has position 0.

# %%
LENGTH, WINDOW = 512, 4
manual = "\n\n".join(pydoc_data.topics.topics[topic] for topic in sorted(pydoc_data.topics.topics))
documents = [text.strip() + "\n" for text in manual.split("\n\n") if len(text.strip()) > 20]
encoded = [np.frombuffer(text.encode("ascii", "replace"), np.uint8) for text in documents]
tokens = np.concatenate(encoded).astype(np.int32)
positions = np.concatenate([np.arange(len(text)) for text in encoded]).astype(np.int32)
count = len(tokens) // LENGTH
rows, segment_pos = (array[: count * LENGTH].reshape(count, LENGTH) for array in (tokens, positions))
train, test = slice(count // 10, None), slice(0, count // 10)
print(
    f"{len(documents)} documents, {count} rows of {LENGTH}; a row holds {(segment_pos == 0).sum(1).mean():.1f} starts"
)

# %% [markdown]
# ## The model
#
# A block is like Griffin's: a projection, a causal convolution over four tokens, a gated linear recurrence, and a gate.
# Convolution and recurrence both see the borders: the convolution takes `segment_pos`, and the recurrence forgets where
# it is 0. A block takes the state before its input. It returns the convolution's input and the recurrence's values,
# which make up the state after any number of tokens.

# %%
WIDTH, VOCABULARY = 128, 128


def recurrence(decay: Any, new: Any, before: Any) -> Any:
    """h[t] = decay[t]*h[t-1] + new[t] along time, from h[-1] = before, in a logarithmic number of steps."""
    new = new.at[:, 0].add(decay[:, 0] * before)

    def combine(a: Any, b: Any) -> Any:
        return (a[0] * b[0], a[1] * b[0] + b[1])

    return jax.lax.associative_scan(combine, (decay, new), axis=1)[1]


class Block(nn.Module):
    @nn.compact
    def __call__(self, x: Any, state: Any, segment_pos: Any) -> tuple[Any, Any]:
        conv_state, before = state
        y = nn.LayerNorm()(x)
        inputs = nn.Dense(WIDTH, name="branch")(y)
        convolution = CausalDepthwiseConv1D(WINDOW, activation="silu", name="convolution")
        u, _ = convolution(inputs, conv_state, segment_pos=segment_pos)
        decay = nn.sigmoid(nn.Dense(WIDTH, name="decay", bias_init=nn.initializers.constant(2.0))(u))
        new = (1 - decay) * nn.Dense(WIDTH, name="value")(u)
        if segment_pos is not None:
            decay = jnp.where(segment_pos[..., None] == 0, 0.0, decay)
        values = recurrence(decay, new, before)
        y = values * nn.silu(nn.Dense(WIDTH, name="gate")(y))
        return x + nn.Dense(WIDTH, name="out")(y), (inputs, values)


class Model(nn.Module):
    inputs: int = VOCABULARY  # rows of the table of embeddings

    @nn.compact
    def __call__(self, tokens: Any, states: Any, segment_pos: Any = None) -> tuple[Any, Any]:
        """Logits for the next token, and what makes up the states after any number of these tokens."""
        x = nn.Embed(self.inputs, WIDTH)(tokens)
        parts = []
        for block, state in enumerate(states):
            x, part = Block(name=f"block{block}")(x, state, segment_pos)
            parts.append(part)
        return nn.Dense(VOCABULARY)(nn.LayerNorm()(x)), parts


def initial(batch: int) -> Any:
    """The states of two blocks before the first token."""
    return [(jnp.zeros((batch, WINDOW - 1, WIDTH)), jnp.zeros((batch, WIDTH)))] * 2


def after(parts: Any, states: Any, lengths: Any) -> Any:
    """The states after the first `lengths` tokens of each row."""
    new = []
    for (inputs, values), (conv_state, before) in zip(parts, states, strict=True):
        conv_state = causal_conv1d_state(inputs, conv_state, kernel_size=WINDOW, lengths=lengths)
        values = jnp.concatenate([before[:, None], values], axis=1)
        new.append((conv_state, jnp.take_along_axis(values, lengths[:, None, None], axis=1)[:, 0]))
    return new


model = Model()
params = model.init(jax.random.key(0), rows[:1], initial(1), segment_pos[:1])["params"]
print(f"{sum(leaf.size for leaf in jax.tree.leaves(params)):,} parameters")

# %% [markdown]
# ## What leaks without resets
#
# How much does the output at one byte depend on the input at another? The pictures show the size of that derivative
# around one border, for the convolution of an untrained block. Without `segment_pos` the first three outputs of a
# document read the end of the document before. With it the derivatives across the border are exactly 0.

# %%
border = int(np.flatnonzero(segment_pos[0] == 0)[1])
around = slice(border - 8, border + 8)
convolution = CausalDepthwiseConv1D(WINDOW)
signal = jax.random.normal(jax.random.key(1), (16, WIDTH))
variables = convolution.init(jax.random.key(2), signal[None])


def dependence(pos: Any) -> np.ndarray:
    """Norms of d y[t] / d x[s], an array (t, s)."""

    def y(x: Any) -> Any:
        return convolution.apply(variables, x[None], segment_pos=pos)[0][0]

    return np.asarray(jnp.sqrt(jnp.square(jax.jacobian(y)(signal)).sum((1, 3))))


packed, leaking = dependence(segment_pos[:1, around]), dependence(None)
across = (slice(8, None), slice(None, 8))
print(f"across the border: {leaking[across].sum():.2f} without segment_pos, {packed[across].sum()} with it")

figure, axes = plt.subplots(1, 2, figsize=(9, 4), sharey=True)
images = []
for axis, values, title in zip(axes, (leaking, packed), ("without segment_pos", "with segment_pos"), strict=True):
    images.append(axis.imshow(values, cmap="magma", vmin=0, vmax=float(leaking.max())))
    axis.grid(visible=False)
    axis.axhline(7.5, color="white", linewidth=1, linestyle="--")
    axis.axvline(7.5, color="white", linewidth=1, linestyle="--")
    axis.set(title=title, xlabel="input byte s")
axes[0].set_ylabel("output byte t")
figure.colorbar(images[0], ax=axes, label="norm of dy[t] / dx[s]")
plt.show()

# %% [markdown]
# One number for the whole model: the gradient of the second document's loss with respect to the embeddings of the first
# document's bytes.

# %%
row, pos = rows[:1, : LENGTH - 1], segment_pos[:1, : LENGTH - 1]
targets = rows[:1, 1:]
second = (np.arange(LENGTH - 1) >= border) & (np.arange(LENGTH - 1) < border + 40)
table = params["Embed_0"]["embedding"]


def leak(pos: Any) -> float:
    def loss(embedded: Any) -> Any:
        # The embedding of a byte is one row of the table: a table of 511 rows, one for each byte of the text.
        replaced = {**params, "Embed_0": {"embedding": embedded}}
        wide = Model(inputs=LENGTH - 1)
        logits, _ = wide.apply({"params": replaced}, np.arange(LENGTH - 1)[None], initial(1), pos)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        return (losses[0] * second).sum()

    gradient = jax.jit(jax.grad(loss))(table[row[0]])
    return float(jnp.abs(gradient[:border]).max())


print(f"largest gradient in the first document: {leak(None):.2g} without resets, {leak(pos)} with them")

# %% [markdown]
# ## Training, packed

# %%
BATCH, STEPS = 16, 150
optimizer = optax.adamw(optax.cosine_decay_schedule(3e-3, STEPS), weight_decay=0.01)


def mean_loss(params: Any, tokens: Any, segment_pos: Any) -> Any:
    """Nats per byte; the last byte of a document does not predict the first of the next."""
    states = initial(len(tokens))
    logits, _ = model.apply({"params": params}, tokens[:, :-1], states, segment_pos[:, :-1])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    counted = segment_pos[:, 1:] > 0
    return (losses * counted).sum() / counted.sum()


@jax.jit
def step(params: Any, state: Any, tokens: Any, segment_pos: Any) -> Any:
    loss, grads = jax.value_and_grad(mean_loss)(params, tokens, segment_pos)
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state, loss


state, losses, generator = optimizer.init(params), [], np.random.default_rng(0)
for _ in range(STEPS):
    chosen = generator.choice(np.arange(count)[train], BATCH, replace=False)
    params, state, loss = step(params, state, rows[chosen], segment_pos[chosen])
    losses.append(float(loss))
held_out = float(jax.jit(mean_loss)(params, rows[test], segment_pos[test]))
print(f"nats per byte: {losses[0]:.2f} at first, {held_out:.2f} on rows held out")

figure, axis = plt.subplots(figsize=(8, 3.5))
axis.plot(losses, linewidth=1, label="training")
axis.axhline(held_out, color="black", linestyle="--", label="held out, after training")
axis.set(xlabel="step", ylabel="nats per byte", title="Python's reference manual, packed")
axis.legend()
plt.show()

# %% [markdown]
# ## One token at a time
#
# The convolution's state is its last three inputs; the recurrence's state is one vector. Decoding with these states
# gives the same numbers as the whole text at once.

# %%
apply = jax.jit(lambda tokens, states: model.apply({"params": params}, tokens, states))
advance = jax.jit(after)

text = encoded[100][None, :60].astype(np.int32)
at_once, _ = apply(text, initial(1))
states, one_by_one = initial(1), []
for token in text.T:
    logits, parts = apply(token[None], states)
    states = advance(parts, states, jnp.array([1]))
    one_by_one.append(logits[:, 0])
print("largest difference in a logit:", float(jnp.abs(jnp.stack(one_by_one, 1) - at_once).max()))

# %% [markdown]
# ## Speculative decoding
#
# A cheap model drafts four tokens; the large one reads them in one pass and keeps those that it would have chosen
# itself. The state already includes the tokens that it does not keep; `causal_conv1d_state` with `lengths` returns the
# state after the kept ones. The drafts come from counts of four bytes in the text. The result is the same text as
# without drafts, in fewer passes of the model.

# %%
DRAFT = 4
following: dict[bytes, dict[int, int]] = {}
for text in encoded:
    data = text.tobytes()
    for i in range(3, len(data)):
        counts = following.setdefault(data[i - 3 : i], {})
        counts[data[i]] = counts.get(data[i], 0) + 1
likeliest = {before: max(counts, key=lambda byte: counts[byte]) for before, counts in following.items()}


def drafted(text: bytes) -> bytes:
    """The likeliest bytes to follow, by counts alone."""
    for _ in range(DRAFT):
        text += bytes([likeliest.get(text[-3:], ord(" "))])
    return text[-DRAFT:]


def as_tokens(text: bytes) -> np.ndarray:
    return np.frombuffer(text, np.uint8)[None].astype(np.int32)


def generate(prompt: bytes, length: int, speculate: bool) -> tuple[bytes, int]:
    """The likeliest continuation of a prompt, and the passes of the model that it took."""
    # The last byte is not in the state yet: it begins the next pass.
    _, parts = apply(as_tokens(prompt[:-1]), initial(1))
    states = advance(parts, initial(1), jnp.array([len(prompt) - 1]))
    text, passes = prompt, 0
    while len(text) < len(prompt) + length:
        guess = drafted(text) if speculate else b""
        logits, parts = apply(as_tokens(text[-1:] + guess), states)
        chosen = bytes(np.asarray(logits.argmax(-1))[0].astype(np.uint8))
        kept = 0
        while kept < len(guess) and guess[kept] == chosen[kept]:
            kept += 1
        states = advance(parts, states, jnp.array([kept + 1]))  # without the bytes that were not kept
        text, passes = text + guess[:kept] + chosen[kept : kept + 1], passes + 1
    return text[: len(prompt) + length], passes


prompt = b"The expression list "
plain, plain_passes = generate(prompt, 120, speculate=False)
fast, fast_passes = generate(prompt, 120, speculate=True)
print(fast.decode())
print(f"{plain_passes} passes one by one, {fast_passes} with drafts; the same text: {fast == plain}")
assert fast == plain
