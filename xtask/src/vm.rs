#[derive(clap::Args)]
pub(crate) struct Options {}
pub(crate) enum Kernel {
    V6_1,
}
pub(crate) fn main(_: &Options) -> anyhow::Result<()> {
    Ok(())
}
pub(crate) fn run(_: Kernel) -> anyhow::Result<()> {
    Ok(())
}
