"""`python -m bench`: every benchmark that needs nothing but this machine, one after the other."""

from bench import block, curve, safe_lora, whole_adapter

if __name__ == "__main__":
    codes = [benchmark.main() for benchmark in (safe_lora, block, whole_adapter, curve)]
    raise SystemExit(max(codes))
