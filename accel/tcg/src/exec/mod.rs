//! Execution: the vCPU object, the loop that looks blocks up, runs them and delivers what is
//! pending, and the threads.

mod vcpu;
pub use vcpu::Vcpu;
