use cnsmo_agent::datapath::kernel::{Kernel, Options, XdpChoice};

#[test]
fn every_program_is_accepted() {
    let state = tempfile::tempdir().unwrap();
    let pins = std::path::PathBuf::from(format!("/sys/fs/bpf/cnsmo-test-{}", std::process::id()));
    let options = Options {
        pins: pins.clone(),
        state: state.path().to_owned(),
        interfaces: vec![],
        xdp: XdpChoice::Auto,
        flows: 1024,
        policy_bytes: 1 << 20,
        rules_max: 1024,
    };
    let opened = Kernel::open(options);
    let error = opened.err().map(|e| format!("{e} {:?}", std::error::Error::source(&e)));
    Kernel::detach(&pins).unwrap();
    if let Some(error) = error {
        panic!("{error}");
    }
}
