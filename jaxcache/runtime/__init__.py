"""What acts: the transfer engine (the only threads) and the agreement (the only collective)."""
