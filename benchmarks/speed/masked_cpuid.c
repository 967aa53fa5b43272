/* Answers CPUID as a processor with AVX2 and nothing newer, for libraries whose `cpuid`
   instructions were replaced by `ud2` (see limited_cpu.py).

   cc -shared -fPIC -O2 masked_cpuid.c -o masked_cpuid.so, loaded by LD_PRELOAD */
#define _GNU_SOURCE
#include <cpuid.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

/* Leaf 7: FSGSBASE, BMI1, AVX2, SMEP, BMI2, ERMS, INVPCID, RDSEED, ADX, SMAP, CLFLUSHOPT and SHA
   stay of EBX; UMIP and RDPID of ECX; FSRM and the reports about speculation of EDX. What goes are
   all AVX-512, AMX and AVX10 sets, VNNI, AVX-VNNI, BF16, FP16, GFNI, VAES and VPCLMULQDQ. */
#define LEAF7_EBX 0x20bc07a9u
#define LEAF7_ECX 0x00400004u
#define LEAF7_EDX 0xbc000410u
/* Leaf 13: the states of x87, SSE and AVX. */
#define STATES 0x7u
#define UD2_BYTES 2

static void mask(unsigned leaf, unsigned subleaf, unsigned *r) {
    if (leaf == 0 && r[0] > 0x16) r[0] = 0x16; /* no leaves of AMX and AVX10 */
    if (leaf == 7 && subleaf == 0) {
        r[0] = 0;
        r[1] &= LEAF7_EBX;
        r[2] &= LEAF7_ECX;
        r[3] &= LEAF7_EDX;
    } else if (leaf == 7 || (leaf > 0x16 && leaf < 0x40000000)) {
        r[0] = r[1] = r[2] = r[3] = 0;
    } else if (leaf == 13 && subleaf == 0) {
        r[0] &= STATES;
        r[3] = 0;
    }
}

static void on_illegal(int number, siginfo_t *info, void *context) {
    greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
    const unsigned char *code = (const unsigned char *)registers[REG_RIP];
    unsigned found[4];
    (void)info;
    if (code[0] != 0x0f || code[1] != 0x0b) {
        signal(number, SIG_DFL); /* any other illegal instruction ends the process as usual */
        return;
    }
    unsigned leaf = (unsigned)registers[REG_RAX], subleaf = (unsigned)registers[REG_RCX];
    __cpuid_count(leaf, subleaf, found[0], found[1], found[2], found[3]);
    mask(leaf, subleaf, found);
    registers[REG_RAX] = found[0];
    registers[REG_RBX] = found[1];
    registers[REG_RCX] = found[2];
    registers[REG_RDX] = found[3];
    registers[REG_RIP] += UD2_BYTES;
}

__attribute__((constructor)) static void install(void) {
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_sigaction = on_illegal;
    action.sa_flags = SA_SIGINFO | SA_NODEFER;
    sigaction(SIGILL, &action, NULL);
}
