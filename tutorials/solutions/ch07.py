"""Solutions of chapter 7, the roadmap."""


def added_by_2d_gate(D, H, depth):
    """Nine weights a channel and a norm of V = D / H channels, in each block."""
    return depth * (9 * D + D // H)


def can_read(i, j, through, w):
    """A scan goes by the number of a token, the local branch by its row and column."""
    if through == "one scan":
        return j <= i
    if through == "two scans":
        return True
    return abs(i // w - j // w) <= 1 and abs(i % w - j % w) <= 1


def images_needed(p, d):
    """d = 2 sqrt(2 p (1 - p) / n), solved for n."""
    return 8 * p * (1 - p) / d**2
