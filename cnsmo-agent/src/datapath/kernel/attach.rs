//! Hooks: choosing them by trying, pinning them, replacing the program in them.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use aya::{
    Ebpf,
    programs::{
        LinkOrder, ProgramError, SchedClassifier, TcAttachType, Xdp, XdpMode,
        links::{FdLink, PinnedLink},
        tc::{self, NlOptions, SchedClassifierLink, TcAttachOptions, TcHandle},
        xdp::XdpLink,
    },
};

use super::{Attachment, KernelError, Options, XdpChoice, load::ensure_loaded, sys};

/// Priority and handle of our filters where tcx is missing: fixed, so that a restarted agent finds them.
const CLSACT_PRIORITY: u16 = 1;
const CLSACT_HANDLE: (u16, u16) = (0, 0xc5);

/// Attaches to every device, or replaces the programs attached there. On an error the hooks that were not there before
/// are removed again.
pub(super) fn attach(
    ebpf: &mut Ebpf,
    options: &Options,
    gateway: bool,
) -> Result<Vec<Attachment>, KernelError> {
    let links = options.pins.join("links");
    let before = pinned(&links);
    let attached: Result<_, _> =
        options.interfaces.iter().map(|name| attach_to(ebpf, options, name, gateway)).collect();
    if attached.is_err() {
        for name in pinned(&links).difference(&before) {
            detach(&links, name);
        }
    }
    attached
}

/// As [`attach`], to one device. Egress first: what a VM sends is known before the answers come. `gateway`: what XDP
/// leaves to TC is judged there.
pub(super) fn attach_to(
    ebpf: &mut Ebpf,
    options: &Options,
    interface: &str,
    gateway: bool,
) -> Result<Attachment, KernelError> {
    let links = options.pins.join("links");
    let device = Device { links: &links, interface, ethernet: is_ethernet(interface)? };
    fs::create_dir_all(&links).map_err(KernelError::file(&links))?;
    let egress = device.tc(ebpf, TcAttachType::Egress)?;
    if gateway && device.ethernet && options.xdp != XdpChoice::Off {
        device.balance(ebpf)?;
    }
    let ingress = device.ingress(ebpf, options.xdp)?;
    if !ingress.starts_with("xdp") {
        device.retire_balance();
    }
    Ok(Attachment { interface: interface.to_owned(), ingress, egress })
}

/// Has what XDP leaves to TC judged there, on a device that is attached to.
pub(super) fn balance(
    ebpf: &mut Ebpf,
    options: &Options,
    attachment: &Attachment,
) -> Result<(), KernelError> {
    let links = options.pins.join("links");
    let device = Device { links: &links, interface: &attachment.interface, ethernet: true };
    if attachment.ingress.starts_with("xdp") { device.balance(ebpf) } else { Ok(()) }
}

/// Ends what [`balance`] began; XDP leaves nothing to TC any more.
pub(super) fn end_balance(options: &Options, attachment: &Attachment) {
    let links = options.pins.join("links");
    let device = Device { links: &links, interface: &attachment.interface, ethernet: true };
    if attachment.ingress.starts_with("xdp") {
        device.retire_balance();
    }
}

/// Detaches from every device but these.
pub(super) fn detach_others(pins: &Path, kept: &[&str]) {
    let links = pins.join("links");
    let kept: Vec<String> = kept.iter().map(|interface| pin_name(interface)).collect();
    for name in pinned(&links) {
        let device = name.split_once('@').map_or(name.as_str(), |(device, _)| device);
        if !kept.iter().any(|kept| kept == device) {
            detach(&links, &name);
        }
    }
}

/// Unpins every link, which detaches it, and removes filters from the devices named in the pins.
pub(super) fn detach_all(pins: &Path) {
    let links = pins.join("links");
    for name in pinned(&links) {
        detach(&links, &name);
    }
}

/// Names of the pins; none without the folder.
fn pinned(links: &Path) -> BTreeSet<String> {
    let Ok(entries) = fs::read_dir(links) else { return BTreeSet::new() };
    entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

fn detach(links: &Path, name: &str) {
    let path = links.join(name);
    let Some((device, _)) = name.split_once(CLSACT_MARK) else {
        // Its device is gone: as wanted. What cannot be detached goes with its pin, a moment later.
        let _ = sys::detach_link(&path);
        let _ = fs::remove_file(path);
        return;
    };
    let interface = &device.replace(DOT, ".");
    for (hook, program) in [
        (TcAttachType::Ingress, "nic_ingress"),
        (TcAttachType::Ingress, "nic_balance"),
        (TcAttachType::Ingress, "tunnel_ingress"),
        (TcAttachType::Egress, "nic_egress"),
        (TcAttachType::Egress, "tunnel_egress"),
    ] {
        // Not there, or the device is gone: as wanted.
        let _ = tc::qdisc_detach_program(interface, hook, program);
    }
    let _ = fs::remove_dir(path);
}

/// Stands for the program behind XDP in the names of pins.
const BALANCE: &str = "balance";

/// Separates device and hook in the name of a pin that stands for filters, which the kernel cannot pin.
const CLSACT_MARK: &str = "@clsact-";

/// Stands for a dot in the name of a pin: bpffs takes none, devices such as `eth0.7` have one.
const DOT: &str = "%";

fn pin_name(interface: &str) -> String {
    interface.replace('.', DOT)
}

struct Device<'a> {
    links: &'a Path,
    interface: &'a str,
    /// Frames begin with an Ethernet header.
    ethernet: bool,
}

impl Device<'_> {
    fn ingress(&self, ebpf: &mut Ebpf, choice: XdpChoice) -> Result<&'static str, KernelError> {
        if self.ethernet && choice != XdpChoice::Off {
            ensure_loaded(ebpf, "nic_xdp")?;
        }
        let modes: &[(XdpMode, &'static str)] = match choice {
            _ if !self.ethernet => &[],
            XdpChoice::Off => &[],
            XdpChoice::Native => &[(XdpMode::Driver, "xdp-native")],
            XdpChoice::Generic => &[(XdpMode::Skb, "xdp-generic")],
            XdpChoice::Auto => &[(XdpMode::Driver, "xdp-native"), (XdpMode::Skb, "xdp-generic")],
        };
        let mut refusals = Vec::new();
        for &(mode, name) in modes {
            match self.xdp(ebpf, mode, name) {
                Ok(()) => {
                    self.retire_ingress(name)?;
                    return Ok(name);
                }
                Err(error) => refusals.push(format!("{name}: {error}")),
            }
        }
        if matches!(choice, XdpChoice::Native | XdpChoice::Generic) && self.ethernet {
            let why = refusals.join("; ");
            return Err(KernelError::Refused(format!("{} takes no {why}", self.interface)));
        }
        if !refusals.is_empty() {
            tracing::warn!(interface = self.interface, ?refusals, "no XDP here; using TC");
        }
        let name = self.tc(ebpf, TcAttachType::Ingress)?;
        self.retire_ingress(name)?;
        Ok(name)
    }

    fn xdp(&self, ebpf: &mut Ebpf, mode: XdpMode, name: &str) -> Result<(), ProgramError> {
        let program: &mut Xdp = program(ebpf, "nic_xdp")?;
        let pin = self.pin(name);
        if let Ok(link) = PinnedLink::from_pin(&pin) {
            let replaced = XdpLink::try_from(FdLink::from(link))
                .map_err(|error| failed(&error))
                .and_then(|link| program.attach_to_link(link));
            match replaced {
                Ok(id) => {
                    // The pin holds the link.
                    drop(program.take_link(id)?);
                    return Ok(());
                }
                // A link of a device that is gone: attach anew.
                Err(_) => drop(fs::remove_file(&pin)),
            }
        }
        let id = program.attach(self.interface, mode)?;
        let link = FdLink::try_from(program.take_link(id)?).map_err(|error| failed(&error))?;
        link.pin(&pin).map(drop).map_err(|error| failed(&error))
    }

    /// tcx where the kernel has it, else a filter of clsact.
    fn tc(&self, ebpf: &mut Ebpf, hook: TcAttachType) -> Result<&'static str, KernelError> {
        let way = if hook == TcAttachType::Egress { "egress" } else { "ingress" };
        let name = match (self.ethernet, hook == TcAttachType::Egress) {
            (true, true) => "nic_egress",
            (true, false) => "nic_ingress",
            (false, true) => "tunnel_egress",
            (false, false) => "tunnel_ingress",
        };
        self.hook(ebpf, hook, name, way)
    }

    /// Beside XDP at ingress; on a kernel without tcx in the place that TC has alone.
    fn balance(&self, ebpf: &mut Ebpf) -> Result<(), KernelError> {
        self.hook(ebpf, TcAttachType::Ingress, "nic_balance", BALANCE).map(drop)
    }

    fn retire_balance(&self) {
        let pin = self.pin(&format!("tcx-{BALANCE}"));
        let mark = self.links.join(format!("{}{CLSACT_MARK}{BALANCE}", pin_name(self.interface)));
        if pin.exists() {
            let _ = sys::detach_link(&pin);
            let _ = fs::remove_file(pin);
        }
        if mark.exists() {
            let _ = tc::qdisc_detach_program(self.interface, TcAttachType::Ingress, "nic_balance");
            let _ = fs::remove_dir(mark);
        }
    }

    /// `way`: last part of the pin's name.
    fn hook(
        &self,
        ebpf: &mut Ebpf,
        hook: TcAttachType,
        name: &str,
        way: &str,
    ) -> Result<&'static str, KernelError> {
        let what = || format!("attach to {}", self.interface);
        ensure_loaded(ebpf, name)?;
        let program: &mut SchedClassifier =
            program(ebpf, name).map_err(KernelError::kernel(what()))?;
        match self.tcx(program, hook, way) {
            Ok(()) => Ok("tcx"),
            // The kernel is older than 6.6.
            Err(ProgramError::SyscallError(error))
                if matches!(error.io_error.raw_os_error(), Some(libc::EINVAL)) =>
            {
                self.clsact(program, hook, way).map_err(KernelError::kernel(what()))?;
                Ok("clsact")
            }
            Err(error) => Err(KernelError::kernel(what())(error)),
        }
    }

    fn tcx(
        &self,
        program: &mut SchedClassifier,
        hook: TcAttachType,
        way: &str,
    ) -> Result<(), ProgramError> {
        let pin = self.pin(&format!("tcx-{way}"));
        if let Ok(link) = PinnedLink::from_pin(&pin) {
            let replaced = SchedClassifierLink::try_from(FdLink::from(link))
                .map_err(|error| failed(&error))
                .and_then(|link| program.attach_to_link(link));
            match replaced {
                Ok(id) => {
                    drop(program.take_link(id)?);
                    return Ok(());
                }
                Err(_) => drop(fs::remove_file(&pin)),
            }
        }
        let order = TcAttachOptions::TcxOrder(LinkOrder::first());
        let id = program.attach_with_options(self.interface, hook, order)?;
        let link = FdLink::try_from(program.take_link(id)?).map_err(|error| failed(&error))?;
        link.pin(&pin).map(drop).map_err(|error| failed(&error))
    }

    fn clsact(
        &self,
        program: &mut SchedClassifier,
        hook: TcAttachType,
        way: &str,
    ) -> Result<(), ProgramError> {
        // There already: as good.
        let _ = tc::qdisc_add_clsact(self.interface);
        let handle = TcHandle::new(CLSACT_HANDLE.0, CLSACT_HANDLE.1);
        let known =
            SchedClassifierLink::attached(self.interface, hook, CLSACT_PRIORITY, handle, None);
        let replaced = known.ok().and_then(|link| program.attach_to_link(link).ok());
        let id = match replaced {
            Some(id) => id,
            None => {
                let options = NlOptions { priority: CLSACT_PRIORITY, handle, ..Default::default() };
                let options = TcAttachOptions::Netlink(options);
                program.attach_with_options(self.interface, hook, options)?
            }
        };
        // A filter stays until it is removed; dropping the link would.
        std::mem::forget(program.take_link(id)?);
        let mark = self.links.join(format!("{}{CLSACT_MARK}{way}", pin_name(self.interface)));
        fs::create_dir_all(&mark).map_err(|error| failed(&error))
    }

    /// Ingress is judged once: hooks of an earlier choice go when the new one is in place.
    fn retire_ingress(&self, kept: &str) -> Result<(), KernelError> {
        for name in ["xdp-native", "xdp-generic", "tcx-ingress"] {
            let pin = self.pin(name);
            if !name.starts_with(kept) && pin.exists() {
                let _ = sys::detach_link(&pin);
                fs::remove_file(&pin).map_err(KernelError::file(&pin))?;
            }
        }
        Ok(())
    }

    fn pin(&self, hook: &str) -> PathBuf {
        self.links.join(format!("{}@{hook}", pin_name(self.interface)))
    }
}

fn failed(error: &dyn std::error::Error) -> ProgramError {
    ProgramError::IOError(std::io::Error::other(format!("failed to keep a link: {error}")))
}

fn program<'a, T>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a mut T, ProgramError>
where
    &'a mut T: TryFrom<&'a mut aya::programs::Program, Error = ProgramError>,
{
    ebpf.program_mut(name).ok_or(ProgramError::NotLoaded)?.try_into()
}

/// Whether frames of the device begin with an Ethernet header; tunnels begin with the IP header.
fn is_ethernet(interface: &str) -> Result<bool, KernelError> {
    match sys::link_layer(interface) {
        Ok(kind) => Ok(kind == libc::ARPHRD_ETHER),
        Err(error) if error.raw_os_error() == Some(libc::ENODEV) => {
            Err(KernelError::Refused(format!("there is no network device {interface}")))
        }
        Err(error) => Err(KernelError::kernel(format!("ask for the type of {interface}"))(error)),
    }
}
