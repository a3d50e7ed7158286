"""The cross-entropy of a head in Triton, from hidden states and labels, without (N, V) logits.

    logits[n, v] = capped(<states[n], rows[v]> + constant[n] + bias[v]), capped(z) = softcap tanh(z / softcap)

states (N, K), rows (V, K): ``hidden @ basis.T`` and codes of a head tied to factors, hidden and decoded rows
of one tied to a packed table. Both have the same kernels.

    fold.py         _fold_kernel: a block of states by a range of rows, in blocks of logits that stay in
                    registers. Maxima, sums of exponentials, and the label's logit are all that is written.
    gradients.py    _gradient_kernel, for 16-bit states of up to 256 columns: recomputes a block of logits,
                    turns it into gradients, and sums their products with states or rows in registers.
                    _logit_gradients_kernel, otherwise: writes the gradients of a piece of the logits, for
                    torch to multiply.

The exponential of the label is left out of the sum, as in the definition: loss and gradient of a prediction
that is nearly certain do not cancel. There are no atomics: partial sums of ranges are written, and added in a
fixed order, so that the same call gives the same bits. fp32 is never cut to TF32 within these kernels.

Source: the loss without logits is that of arXiv 2411.09009. Its kernels filter blocks of negligible gradients
and add with locks; these do neither.
"""
