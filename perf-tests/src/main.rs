//! `shoal-perf`; all of it is in the library, so that `fuzz/` reaches its parsers.

fn main() -> anyhow::Result<()> {
    shoal_perf::main()
}
