"""What a teacher can say about a text: the kinds of signals, and who gives or reads which."""

from typing import Literal

# Rows of hidden states with the head that makes logits of them; the most probable tokens' log-
# probabilities with the mass of the others; or nothing but the text itself.
SignalKind = Literal["hidden", "top_k", "text"]
