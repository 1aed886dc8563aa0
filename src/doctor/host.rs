//! The host's processor, as far as translation profits from it.

/// A feature of the host and what translation does with it.
pub struct Feature {
    /// Its name as in /proc/cpuinfo.
    pub name: &'static str,
    /// Whether the host has it.
    pub present: bool,
    /// What it means for guests.
    pub means: &'static str,
}

/// The features that matter, most important first.
#[cfg(target_arch = "x86_64")]
pub fn features() -> Vec<Feature> {
    macro_rules! features {
        ($($name:tt $means:literal,)*) => {
            vec![$(Feature { name: $name, present: is_x86_feature_detected!($name), means: $means },)*]
        };
    }
    features! {
        "sse4.2" "guests up to x86-64-v2",
        "avx" "guest AVX instructions run as they are",
        "avx2" "guests up to x86-64-v3",
        "fma" "guests up to x86-64-v3",
        "bmi2" "guests up to x86-64-v3; shifts that leave flags alone",
        "avx512f" "guests up to x86-64-v4",
        "avx512bw" "guests up to x86-64-v4; mask registers",
        "aes" "guest AES at full speed",
        "pclmulqdq" "guest carry-less multiplication at full speed",
        "sha" "guest SHA at full speed",
    }
}

/// Hosts of other architectures have no instruction in common with the guest.
#[cfg(not(target_arch = "x86_64"))]
pub fn features() -> Vec<Feature> {
    Vec::new()
}

/// The processor's own name.
pub fn processor() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let field = |key: &str| {
        info.lines().find_map(|l| {
            let (k, v) = l.split_once(':')?;
            (k.trim() == key).then(|| v.trim().to_string())
        })
    };
    field("model name").or_else(|| field("Model")).unwrap_or_else(|| "unknown processor".into())
}

/// The kernel's name and release.
pub fn kernel() -> String {
    let read = |f| std::fs::read_to_string(f).unwrap_or_default().trim().to_string();
    format!("{} {}", read("/proc/sys/kernel/ostype"), read("/proc/sys/kernel/osrelease"))
}
