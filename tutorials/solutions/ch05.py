"""Solutions of chapter 5, from an image to logits."""


def pixels_of_token(r, patch_size):
    """Row m of the first convolution reads s m - 1 to s m + kernel - 2; the token reads rows 2r - 1 to 2r + 1 of it."""
    s = patch_size // 2
    kernel = max(s + 1, 3)
    return s * (2 * r - 1) - 1, s * (2 * r + 1) + kernel - 2


def paper_gate(weight, bias):
    """1 - sigmoid(z) = sigmoid(-z), and z is linear in weight and bias together."""
    return -weight, -bias


def same_norm_eps(c, eps):
    """c o / sqrt(c^2 mean(o^2) + eps) = o / sqrt(mean(o^2) + eps / c^2)."""
    return eps / c**2


def break_even_tokens(D, H):
    """2 T^2 d = (2/H) T d^2 + 32 T d, divided by 2 T d."""
    return D / H + 16
