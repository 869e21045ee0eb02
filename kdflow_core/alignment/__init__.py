"""How two tokenizations of one text stand to each other, by the bytes of their token ids."""
