//! Networks that come and go while the machine runs.

use crate::config::Netdev;
use crate::qapi::define::Nothing;
use crate::qapi::{self, Context, Error, Result, Type};
use std::os::fd::AsRawFd;

crate::object! {
    /// A text.
    pub struct NetString {
        /// The text.
        str: String,
    }
    /// The host's network, without privileges.
    pub struct NetdevUserOptions {
        /// Name.
        id: String,
        /// Host name for the guest.
        hostname: Option<String>,
        /// The guest reaches nothing but what is forwarded.
        restrict: Option<bool>,
        /// IPv4.
        ipv4: Option<bool>,
        /// IPv6.
        ipv6: Option<bool>,
        /// IPv4 network.
        net: Option<String>,
        /// The host in it.
        host: Option<String>,
        /// First address that DHCP gives.
        dhcpstart: Option<String>,
        /// The name server in it.
        dns: Option<String>,
        /// Domain for the guest.
        domainname: Option<String>,
        /// IPv6 network of 64 bits.
        ipv6_prefix: Option<String>,
        /// The host in it.
        ipv6_host: Option<String>,
        /// The name server in it.
        ipv6_dns: Option<String>,
        /// Ports of the host that lead to the guest.
        hostfwd: Option<Vec<NetString>>,
        /// Ports of the guest's network that lead to the host.
        guestfwd: Option<Vec<NetString>>,
    }
    /// An interface of the host.
    pub struct NetdevTapOptions {
        /// Name.
        id: String,
        /// Name of the interface.
        ifname: Option<String>,
        /// An open tap device: a number, or the name that `getfd` gave it.
        fd: Option<String>,
        /// Must be `no`.
        script: Option<String>,
        /// Must be `no`.
        downscript: Option<String>,
    }
    /// Address of a socket.
    pub struct SocketAddress {
        /// `unix`, `inet` or `fd`.
        r#type: String,
        /// Of a unix socket.
        path: Option<String>,
        /// Of an internet socket.
        host: Option<String>,
        /// Of an internet socket.
        port: Option<String>,
        /// Number of a descriptor.
        str: Option<String>,
    }
    /// Another program, over a stream.
    pub struct NetdevStreamOptions {
        /// Name.
        id: String,
        /// Where the other program is.
        addr: SocketAddress,
        /// We wait for it.
        server: Option<bool>,
        /// Seconds until a broken connection is made again.
        reconnect: Option<u32>,
        /// Milliseconds until then.
        reconnect_ms: Option<u64>,
    }
    /// Another program, by datagrams.
    pub struct NetdevDgramOptions {
        /// Name.
        id: String,
        /// Where we receive.
        local: Option<SocketAddress>,
        /// Where we send.
        remote: Option<SocketAddress>,
    }
}

crate::variants! {
    /// A network.
    pub enum NetdevOptions by "type" {
        /// The host's network, without privileges.
        User(NetdevUserOptions) = "user",
        /// An interface of the host.
        Tap(NetdevTapOptions) = "tap",
        /// Another program, over a stream.
        Stream(NetdevStreamOptions) = "stream",
        /// Another program, by datagrams.
        Dgram(NetdevDgramOptions) = "dgram",
    }
}

fn add(cx: &mut Context<'_>, mut options: NetdevOptions) -> Result<Nothing> {
    // Kept until the network has an own copy.
    let mut given = None;
    if let NetdevOptions::Tap(NetdevTapOptions { fd: Some(fd), .. }) = &mut options
        && fd.parse::<u32>().is_err()
    {
        let named = cx.session.and_then(|s| s.named_fds().remove(fd));
        let named = named.ok_or_else(|| {
            Error::new(format!("File descriptor named '{fd}' has not been found"))
        })?;
        *fd = named.as_raw_fd().to_string();
        given = Some(named);
    }
    let words = crate::qemu::network_words("netdev", &options.write().to_string())?;
    let mut faults = Vec::new();
    let made = Netdev::parse("netdev_add", &words, &mut faults);
    if let Some(n) = &made {
        n.validate(&mut faults);
    }
    let Some(n) = made.filter(|_| faults.is_empty()) else { return Err(qapi::faults(faults)) };
    let done = cx.vm.add_network(n);
    drop(given);
    done.map(|()| Nothing {})
}

crate::commands! {
    /// Starts a network, for a card.
    fn "netdev_add"(cx, [ options: NetdevOptions ]) -> Nothing { add(cx, options) }

    /// Ends a network that no card uses.
    fn "netdev_del"(cx, {
        /// Its name.
        id: String,
    }) -> Nothing { cx.vm.remove_network(&id).map(|()| Nothing {}) }
}
