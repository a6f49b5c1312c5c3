"""The processes of an engine of several ranks: how they start, what they are told, who watches them."""
