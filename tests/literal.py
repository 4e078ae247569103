"""Slow, literal statements of the algorithms in numpy, which the fast ones must equal.

Symbols: W [N, K], H [K, K], group size g, G = K // g groups; codes C, scale S (float16 values), zero Z; Q = (C - Z) S.
"""

import numpy as np


def expand(a, g, columns):
    return np.repeat(a, g, axis=1)[:, :columns]


def dequantize(C, S, Z, g):
    return (C - expand(Z, g, C.shape[1])) * expand(S, g, C.shape[1])


def error(W, Q, H):
    return float((((W - Q) @ H) * (W - Q)).sum() / ((W @ H) * W).sum())


def fp16(a):
    rounded = np.asarray(a).astype(np.float16).astype(np.float64)
    return np.where(rounded == 0, 2.0**-24, rounded)


def groups(W, g):
    return [W[:, i : i + g] for i in range(0, W.shape[1], g)]


def minmax_grid(W, bits, g, symmetric, lowest_zero=0):
    top, S, Z = 2**bits - 1, [], []
    for part in groups(W, g):
        if symmetric:
            extreme = np.array([row[np.abs(row).argmax()] for row in part])
            S.append(fp16(-extreme / 2 ** (bits - 1)))
            Z.append(np.full(len(part), 2.0 ** (bits - 1)))
        else:
            low, high = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
            S.append(fp16((high - low) / top))
            Z.append(np.clip(np.round(-low / S[-1]), lowest_zero, top))
    return np.stack(S, 1), np.stack(Z, 1)


def searched_grid(W, bits, g, symmetric, importance, steps=60, smallest=0.45, refine=0, lowest_zero=0):
    """importance [K] or [N, K]; the first grid of least weighted squared error wins."""
    importance = np.broadcast_to(importance, W.shape)
    top = 2**bits - 1
    S, Z = np.zeros((len(W), len(groups(W, g)))), np.zeros((len(W), len(groups(W, g))))
    for r in range(len(W)):
        for i, (w, h) in enumerate(zip(groups(W, g), groups(importance, g), strict=True)):
            best = np.inf
            for f in np.linspace(1.1 if symmetric else 1.0, smallest, steps):
                if symmetric:
                    extreme = w[r][np.abs(w[r]).argmax()]
                    tries = [(-extreme * f / 2 ** (bits - 1), 2.0 ** (bits - 1))]
                else:
                    low, high = min(w[r].min(), 0), max(w[r].max(), 0)
                    s = (high - low) * f / top
                    at = -low * f / max(s, 2.0**-24)
                    tries = [(s, np.clip(z, lowest_zero, top)) for z in (np.floor(at), np.ceil(at))]
                for s, z in tries:
                    s = float(fp16(s))
                    q = np.clip(np.round(w[r] / s), -z, top - z)
                    e = (h[r] * (q * s - w[r]) ** 2).sum()
                    if e < best:
                        best, S[r, i], Z[r, i] = e, s, z
            for _ in range(refine):
                z = Z[r, i]
                q = np.clip(np.round(w[r] / S[r, i]), -z, top - z)
                energy = (h[r] * q * q).sum()
                s = float(fp16((h[r] * q * w[r]).sum() / energy if energy > 0 else S[r, i]))
                q = np.clip(np.round(w[r] / s), -z, top - z)
                e = (h[r] * (q * s - w[r]) ** 2).sum()
                if not e < best:
                    break
                best, S[r, i] = e, s
    return S, Z


def rtn(W, S, Z, bits, g):
    K = W.shape[1]
    return np.clip(np.round(W / expand(S, g, K)) + expand(Z, g, K), 0, 2**bits - 1)


def hqq(W, bits, g, symmetric, whole, fit_scale, p=0.7, beta=10.0, kappa=1.01, iterations=20, lowest_zero=0):
    """Half-quadratic splitting, group by group and weight by weight: codes, S, Z of the least lp error that came by."""
    top, middle = 2**bits - 1, 2 ** (bits - 1)
    S, Z = minmax_grid(W, bits, g, symmetric, lowest_zero)
    C, G = np.zeros(W.shape), S.shape[1]
    for r in range(len(W)):
        for i in range(G):
            w = W[r, i * g : (i + 1) * g]
            n = len(w)
            s, z, best, last = S[r, i], Z[r, i], np.inf, np.inf
            if not (whole or symmetric):  # the grid of round-to-nearest, then one with fractions that meets both ends
                C[r, i * g : (i + 1) * g] = c = np.clip(np.round(w / s + z), 0, top)
                best, z = sum(abs(x) ** p for x in w - (c - z) * s), float(np.float16(-min(w.min(), 0) / s))
            for turn in range(iterations + 1):
                c, t, error = np.zeros(n), np.zeros(n), 0.0
                for k in range(n):
                    c[k] = np.round(w[k] / s) + z if whole or symmetric else np.round(w[k] / s + z)
                    c[k] = min(max(c[k], 0), top)
                    x = w[k] - (c[k] - z) * s
                    error += abs(x) ** p
                    e = np.sign(x) * max(abs(x) - abs(x) ** (p - 1) / (beta * kappa**turn), 0) if x else 0
                    t[k] = w[k] - e
                if error < best:
                    best, S[r, i], Z[r, i], C[r, i * g : (i + 1) * g] = error, s, z, c
                if error >= last or turn == iterations:
                    break
                last = error
                if symmetric:
                    level = c - middle
                    s = fp16(level @ t / (level @ level)) if fit_scale and (level @ level) and level @ t else s
                    continue
                if fit_scale and c.std() > 0:  # the regression line of t on c
                    slope = np.polyfit(c, t, 1)[0]
                    slope = slope if slope > 0 else s
                    if whole:
                        level = c - np.clip(np.round(c.mean() - t.mean() / slope), lowest_zero, top)
                        slope = level @ t / (level @ level)
                    s = fp16(slope) if slope > 0 else s
                z = c.mean() - t.mean() / s
                z = np.clip(np.round(z), lowest_zero, top) if whole else float(np.float16(z))
    return C, S, Z


def inverse_factor(H, damp):
    """The textbook way: invert, then Cholesky."""
    damped = H + damp * np.mean(np.diag(H)) * np.eye(len(H))
    return np.linalg.cholesky(np.linalg.inv(damped)).T


def gptq(W, H, bits, g, S, Z, order, damp=0.01):
    """Column by column on a static grid; S, Z by group in memory order, Z whole or not."""
    U = inverse_factor(H[np.ix_(order, order)], damp)
    V, C = W[:, order].copy(), np.zeros(W.shape)
    for j, k in enumerate(order):
        s, z = S[:, k // g], Z[:, k // g]
        c = np.clip(np.round(V[:, j] / s + z % 1) + np.floor(z), 0, 2**bits - 1)
        V[:, j:] -= np.outer((V[:, j] - (c - z) * s) / U[j, j], U[j, j:])
        C[:, k] = c
    return C


def gptq_dynamic(W, H, bits, g, grid, order, damp=0.01):
    """Column by column; a group's grid is chosen from the weights as corrected when its first column comes up."""
    U = inverse_factor(H[np.ix_(order, order)], damp)
    V, C, K = W[:, order].copy(), np.zeros(W.shape), W.shape[1]
    S, Z = [], []
    for j in range(K):
        if j % g == 0:
            s, z = grid(V[:, j : j + g], np.diag(H)[order][j : j + g])
            S.append(s[:, 0])
            Z.append(z[:, 0])
        c = np.clip(np.round(V[:, j] / S[-1]) + Z[-1], 0, 2**bits - 1)
        V[:, j:] -= np.outer((V[:, j] - (c - Z[-1]) * S[-1]) / U[j, j], U[j, j:])
        C[:, order[j]] = c
    return C, np.stack(S, 1), np.stack(Z, 1)


def refit(W, H, C, Z, g, S, ridge=1e-4):
    """One G x G solve per row, kept where the error of the row falls."""
    N, K = W.shape
    G = S.shape[1]
    B = C - expand(Z, g, K)
    Hd = H + ridge * np.mean(np.diag(H)) * np.eye(K)
    out = S.copy()
    for r in range(N):
        P = np.zeros((K, G))
        P[np.arange(K), np.arange(K) // g] = B[r]
        M, b = P.T @ Hd @ P, P.T @ Hd @ W[r]
        M[np.diag_indices(G)] += 1e-9 * np.trace(M) / G + 1e-12
        s = np.linalg.solve(M, b)
        s = fp16(np.where(np.abs(s) < 1e-8, S[r], s))

        def loss(x, M=M, b=b):
            return x @ M @ x - 2 * b @ x

        if loss(s) < loss(S[r]):
            out[r] = s
    return out


def descend(W, H, C, S, Z, bits, g, order, sweeps):
    K = W.shape[1]
    s, z, d = expand(S, g, K), expand(Z, g, K), np.diag(H)
    C, Q = C.copy(), (C - z) * s
    for _ in range(sweeps):
        R = (W - Q) @ H
        for k in order:
            c = np.clip(np.round((Q[:, k] + R[:, k] / d[k]) / s[:, k]) + z[:, k], 0, 2**bits - 1)
            q = (c - z[:, k]) * s[:, k]
            R -= np.outer(q - Q[:, k], H[k])
            Q[:, k], C[:, k] = q, c
    return C


def layer(N=24, K=160, T=1024, seed=0):
    """A weight with heavy tails and inputs that are correlated and of uneven size: (W, H, held-out H)."""
    rng = np.random.default_rng(seed)
    A = rng.standard_normal((K, K // 4)) / np.sqrt(K // 4)
    gain = np.exp(0.5 * rng.standard_normal(K))
    gain[rng.choice(K, 3, replace=False)] *= 8

    def rows():
        return (rng.standard_normal((T, K // 4)) @ A.T + 0.3 * rng.standard_normal((T, K))) * gain

    X, Y = rows(), rows()
    return 0.02 * rng.standard_t(6, (N, K)), X.T @ X / T, Y.T @ Y / T


def awq(W, H, bits, g, n_grid, rows=None):
    """The scale of least error among a^r / w^(1-r), or ones; `rows` [K] names the scale that a column shares."""
    rows = np.arange(W.shape[1]) if rows is None else np.asarray(rows)
    mean = np.array([[rows == r] for r in range(rows.max() + 1)], dtype=float)[:, 0]
    mean /= mean.sum(1, keepdims=True)
    a = np.sqrt(mean @ np.diag(H))
    relative = np.concatenate([np.abs(p) / np.abs(p).max(1, keepdims=True) for p in groups(W, g)], 1)
    w = mean @ relative.mean(0)

    def loss(s):
        V = W * s[rows]
        S, Z = minmax_grid(V, bits, g, False)
        E = W - dequantize(rtn(V, S, Z, bits, g), S, Z, g) / s[rows]
        return ((E @ H) * E).sum()

    best = np.ones(len(a))
    least = loss(best)
    for i in range(n_grid):
        s = a ** (i / n_grid) / (w ** (1 - i / n_grid) + 1e-4)
        s = np.maximum(s, 1e-4)
        s = s / np.sqrt(s.max() * s.min())
        if loss(s) < least:
            best, least = s, loss(s)
    return best


def smoothing(largest, weights, alpha, columns=None):
    """s[r] = a[r]^alpha / w[r]^(1 - alpha) around 1, channel by channel; `columns` [K] names the factor of each."""
    columns = np.arange(len(largest)) if columns is None else np.asarray(columns)
    s = []
    for r in range(columns.max() + 1):
        a = max(largest[k] for k in np.flatnonzero(columns == r))
        w = max(abs(v) for W in weights for k in np.flatnonzero(columns == r) for v in W[:, k])
        s.append(float(a) ** alpha / float(w) ** (1 - alpha))
    return np.array(s) / np.sqrt(max(s) * min(s))


def smoothquant(X, largest, weights, n_grid, error, columns=None):
    """The factors of least error(rows X / s, weights W s, products X W^T) over a grid of alpha, and the alpha.

    Ones and None where no factors are better.
    """
    columns = np.arange(X.shape[1]) if columns is None else np.asarray(columns)
    products = [X @ W.T for W in weights]
    best, chosen = np.ones(columns.max() + 1), None
    least = error(X, weights, products)
    for i in range(n_grid + 1):
        s = smoothing(largest, weights, i / n_grid, columns)
        found = error(X / s[columns], [W * s[columns] for W in weights], products)
        if found < least:
            best, chosen, least = s, i / n_grid, found
    return best, chosen


def rounded_products(X, weights, products, a_bits, w_bits, clip=1.0):
    """Squared error with X rounded per token and each row of W to a grid of its own, both symmetric."""
    total = 0.0
    for W, P in zip(weights, products, strict=True):
        S, Z = minmax_grid(W, w_bits, W.shape[1], True)
        Q = dequantize(rtn(W, S, Z, w_bits, W.shape[1]), S, Z, W.shape[1])
        total += ((per_token(X, a_bits, True, -1, clip) @ Q.T - P) ** 2).sum()
    return float(total)


def per_token(x, bits, symmetric, g, clip):
    """Entry by entry; float32 as the fast one, so that they agree exactly."""
    out = np.zeros(x.shape, np.float32)
    f = np.float32
    for at in np.ndindex(x.shape[:-1]):
        size = x.shape[-1] if g == -1 else g
        for i in range(0, x.shape[-1], size):
            row = x[at][i : i + size].astype(np.float32)
            low, high = f(min(row.min(), 0)) * f(clip), f(max(row.max(), 0)) * f(clip)
            if low == high == 0:
                continue
            for j, v in enumerate(row):
                if symmetric:
                    s = f(max(high, -low)) / f(2 ** (bits - 1) - 1)
                    code = min(max(np.round(v / s), -(2 ** (bits - 1))), 2 ** (bits - 1) - 1)
                    out[at][i + j] = f(code) * s
                else:
                    s = (high - low) / f(2**bits - 1)
                    z = np.round(-low / s)
                    code = min(max(np.round(v / s) + z, 0), 2**bits - 1)
                    out[at][i + j] = f(code - z) * s
    return out


def codebook(W, table, g):
    """Block by block, weight by weight: the nearest value of the table times the block's largest |w|; in float32.

    Of two values at one distance the smaller wins, of two codes of one value the first that a stable sort gives.
    """
    W, table = W.astype(np.float32), table.astype(np.float32)
    order = sorted(range(len(table)), key=lambda i: table[i])
    C, S = np.zeros(W.shape, np.uint8), []
    for start in range(0, W.shape[1], g):
        block = W[:, start : start + g]
        scale = np.abs(block).max(1)
        S.append(scale)
        for r in range(len(W)):
            inverse = np.float32(1) / max(scale[r], np.float32(1e-38))
            for k in range(block.shape[1]):
                x = min(max(block[r, k] * inverse, np.float32(-1)), np.float32(1))
                at = 0
                while at < len(order) - 1 and x > (table[order[at]] + table[order[at + 1]]) / np.float32(2):
                    at += 1
                C[r, start + k] = order[at]
    return C, np.stack(S, 1)


def nested(S, table):
    """Scales in runs of 256 of the flattened matrix, around their mean: the nearest of the 256 values of each."""
    flat = S.reshape(-1).astype(np.float64)
    out = np.zeros(flat.shape)
    mean = np.float64(np.float32(flat.mean()))
    for start in range(0, len(flat), 256):
        run = flat[start : start + 256] - mean
        largest = np.abs(run).max()
        for i, value in enumerate(run):
            x = value / largest if largest else 0.0
            out[start + i] = min(table, key=lambda v: abs(v - x)) * largest + mean
    return out.reshape(S.shape)


def cayley_step(X, G, M, learning_rate, beta):
    """Algorithm 1 of https://arxiv.org/abs/2002.01113 with q = 0.5, its fixed-point iteration run until it stands."""
    M = beta * M - G
    W = M @ X.T - 0.5 * X @ (X.T @ M @ X.T)
    W = W - W.T
    M = W @ X
    alpha = min(learning_rate, 2 * 0.5 / (np.sqrt((W**2).sum()) + 1e-8))
    Y = X + alpha * M
    for _ in range(100):
        Y = X + alpha / 2 * W @ (X + Y)
    return Y, M


def int8_rows(weight):
    """LLM.int8()'s codes and scales, number by number, in float16 and float32 as bitsandbytes has them."""
    half = weight.astype(np.float16)
    codes, largest = np.zeros(half.shape, np.int8), np.zeros(len(half), np.float32)
    for n, row in enumerate(half):
        largest[n] = max(abs(float(w)) for w in row)
        if largest[n] > 0:
            for k, w in enumerate(row):
                codes[n, k] = np.rint(np.float32(w) * (np.float32(127) / largest[n]))
    return codes, largest


def int8_product(x, codes, largest, threshold):
    """LLM.int8()'s product, section 3.2: outlier columns as they are, a scale for each vector."""
    half = x.astype(np.float16)
    outliers = {k for k in range(x.shape[1]) if threshold > 0 and any(abs(v) >= threshold for v in half[:, k])}
    out = np.zeros((len(x), len(codes)))
    for m, token in enumerate(half):
        kept = [v for v in token if threshold == 0 or abs(v) < threshold]
        scale = np.float32(max((abs(v) for v in kept), default=0))
        for n in range(len(codes)):
            total = 0
            for k in range(x.shape[1]):
                if k in outliers:
                    out[m, n] += float(x[m, k]) * float(codes[n, k]) * float(largest[n]) / 127
                elif scale > 0:
                    total += int(np.rint(np.float32(token[k]) * (np.float32(127) / scale))) * int(codes[n, k])
            out[m, n] += total * float(scale) * float(largest[n]) / 127**2
    return out
