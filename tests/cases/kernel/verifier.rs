use cnsmo_agent::datapath::kernel::{Kernel, Options, XdpChoice};
use cnsmo_tests::PinDir;

#[test]
fn every_program_is_accepted() {
    let state = tempfile::tempdir().unwrap();
    let pins = PinDir::new("verifier");
    let mut kernel = Kernel::open(Options {
        pins: pins.path().to_owned(),
        state: state.path().to_owned(),
        interfaces: vec![],
        xdp: XdpChoice::Auto,
        flows: 1_024,
        policy_bytes: 1 << 20,
        rules_max: 1_024,
    })
    .unwrap();
    let programs = kernel.programs();
    assert!(programs.len() >= 10, "{programs:?}");
    for program in programs {
        // Loading comes with the run; what the frame is does not matter.
        let run = kernel.test_run(&program, &[0; 64]);
        assert!(run.is_ok(), "{program}: {}", run.unwrap_err());
    }
}
