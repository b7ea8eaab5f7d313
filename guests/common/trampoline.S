/* Another processor starts here in real mode, in a copy of this page in conventional memory (smp.c). */

#define CR0_PE 0x1
#define CR0_PG 0x80000000
#define CR4_PAE 0x20
#define MSR_EFER 0xC0000080
#define EFER_LME 0x100
#define KERNEL_CODE 0x08
#define KERNEL_DATA 0x10
#define KERNEL_CODE32 0x38

    .section .rodata
    .code16
    .balign 16
    .globl trampoline_start, trampoline_end, trampoline_counter
trampoline_start:
    cli
    movw %cs, %ax
    movw %ax, %ds
    lock incl trampoline_counter - trampoline_start
    lgdtl trampoline_gdt - trampoline_start
    movl %cr0, %eax
    orl $CR0_PE, %eax
    movl %eax, %cr0
    ljmpl $KERNEL_CODE32, $ap_protected
    .balign 4
trampoline_counter:
    .long 0
trampoline_gdt: /* the limit covers the whole table of start.S, whose address only the linker knows */
    .word 0x3F
    .long gdt
trampoline_end:

    .text
    .code32
ap_protected:
    movl $KERNEL_DATA, %eax
    movl %eax, %ds
    movl %eax, %ss
    movl $pml4, %eax
    movl %eax, %cr3
    movl %cr4, %eax
    orl $CR4_PAE, %eax
    movl %eax, %cr4
    movl $MSR_EFER, %ecx
    rdmsr
    orl $EFER_LME, %eax
    wrmsr
    movl %cr0, %eax
    orl $CR0_PG, %eax
    movl %eax, %cr0
    ljmp $KERNEL_CODE, $ap_long

    .code64
ap_long:
    movl $KERNEL_DATA, %eax
    movl %eax, %es
    movl $ap_stack_top, %esp
    xorl %ebp, %ebp
    call ap_main

    .bss
    .balign 16
    .skip 4096
ap_stack_top:

    .section .note.GNU-stack, "", @progbits
