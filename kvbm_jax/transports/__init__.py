"""Events beyond this process: the codec and the transports that need optional packages. Nothing below imports them."""
